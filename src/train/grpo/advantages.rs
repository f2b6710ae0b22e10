//! From rewards to advantages.

use super::ScaleRewards;

/// What [`scale_rewards`](super::GrpoArguments::scale_rewards) divides by is at least this.
const LEAST_STD: f64 = 1e-4;

/// How much better each completion is than its group.
#[derive(Debug, Clone, PartialEq)]
pub struct Advantages {
    pub values: Vec<f64>,
    /// Completions whose standard deviation (of the group, or of the batch with `ScaleRewards::Batch`) is 0.
    pub zero_std: usize,
}

/// `A_i = (r_i - mean of its group) / (std + 1e-4)`, with the unbiased standard deviation of the group or of the whole batch, or
/// without one; groups are `num_generations` neighbours. A reward of None counts nothing in mean and deviation, and its advantage
/// is 0.
pub fn advantages(rewards: &[Option<f64>], num_generations: usize, scale: ScaleRewards) -> Advantages {
    let batch_std = std(rewards);
    let (mut values, mut zero_std) = (Vec::with_capacity(rewards.len()), 0);
    for group in rewards.chunks(num_generations) {
        let mean = mean(group);
        let std = if scale == ScaleRewards::Batch { batch_std } else { std(group) };
        zero_std += if std <= 1e-8 { group.len() } else { 0 };
        let divisor = if scale == ScaleRewards::None { 1.0 } else { std + LEAST_STD };
        values.extend(group.iter().map(|reward| reward.map_or(0.0, |reward| (reward - mean) / divisor)));
    }
    Advantages { values, zero_std }
}

pub(super) fn mean(values: &[Option<f64>]) -> f64 {
    let (sum, count) = values.iter().flatten().fold((0.0, 0), |(sum, count), value| (sum + value, count + 1));
    sum / f64::from(count)
}

/// Unbiased; 0 of fewer than two numbers.
pub(super) fn std(values: &[Option<f64>]) -> f64 {
    let (mean, count) = (mean(values), values.iter().flatten().count());
    if count < 2 {
        return 0.0;
    }
    let squares: f64 = values.iter().flatten().map(|value| (value - mean).powi(2)).sum();
    (squares / (count - 1) as f64).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_compared_with_themselves() {
        let rewards = [1.0, 0.0, 0.0, 1.0, 3.0, 3.0, 3.0, 3.0].map(Some);
        let group = advantages(&rewards, 4, ScaleRewards::Group);
        let std = (1.0f64 / 3.0).sqrt();
        assert_eq!(group.zero_std, 4);
        assert_eq!(group.values[0], 0.5 / (std + 1e-4));
        assert_eq!(&group.values[4..], &[0.0; 4]);
        let none = advantages(&rewards, 4, ScaleRewards::None).values;
        assert_eq!(none[..4], [0.5, -0.5, -0.5, 0.5]);
    }

    #[test]
    fn what_has_no_reward_moves_nothing() {
        let found = advantages(&[Some(1.0), None, Some(0.0), None, None, Some(2.0)], 3, ScaleRewards::None);
        assert_eq!(found.values, [0.5, 0.0, -0.5, 0.0, 0.0, 0.0]);
        assert_eq!(advantages(&[None; 3], 3, ScaleRewards::Group).values, [0.0; 3]);
    }
}
