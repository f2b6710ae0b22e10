//! Small problems with one checkable answer each, for models of a few million parameters.
//!
//! A [`Problem`] comes from a family and a difficulty from 1 to [`HARDEST`], with a question, the answer, and the short
//! working that leads there. They train the embedded default model, and reward it: [`is_correct`] judges a reply.
//! [`Problem::is_held_out`] depends on the problem itself (its family and operands) and not on its wording, so a problem
//! that is kept for evaluation is never trained on, whatever the seed and the number of rows.

use rand::Rng;
use rand::seq::{IndexedRandom, SliceRandom};
use rand_chacha::ChaCha8Rng;
use sha2::{Digest, Sha256};

/// The highest difficulty.
pub const HARDEST: usize = 5;

/// One question with its only right answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// One of [`FAMILIES`].
    pub family: &'static str,
    /// 1 (easy) to [`HARDEST`].
    pub difficulty: usize,
    /// The question as a user asks it.
    pub question: String,
    /// The whole reply that is right.
    pub answer: String,
    /// The working, as it may stand between `<think>` and `</think>`.
    pub working: String,
    /// What makes two problems of a family the same, in whatever words they are asked.
    operands: String,
}

type Make = fn(&mut ChaCha8Rng, usize) -> Draft;

/// The families, in the order in which scores are listed.
pub const FAMILIES: [&str; 14] = [
    "add",
    "subtract",
    "multiply",
    "remainder",
    "sum",
    "largest",
    "sort",
    "sequence",
    "story",
    "weekday",
    "alphabet",
    "letter",
    "count",
    "reverse",
];

const MAKE: [Make; FAMILIES.len()] = [
    add, subtract, multiply, remainder, sum, largest, sort, sequence, story, weekday, alphabet, letter,
    count, reverse,
];

impl Problem {
    /// A problem of family `FAMILIES[family]`; `difficulty` is 1 to [`HARDEST`].
    pub fn new(family: usize, difficulty: usize, rng: &mut ChaCha8Rng) -> Self {
        let Draft { question, answer, working, operands } = MAKE[family](rng, difficulty);
        Self { family: FAMILIES[family], difficulty, question, answer, working, operands }
    }

    /// Whether the problem is kept for evaluation: one in sixteen, by a hash of its family and operands.
    pub fn is_held_out(&self) -> bool {
        Sha256::digest(format!("{} {}", self.family, self.operands))[0] < 16
    }

    /// The reply with its working: `<think>..</think><answer>..</answer>`.
    pub fn reply_with_working(&self) -> String {
        format!("<think>{}</think><answer>{}</answer>", self.working, self.answer)
    }
}

/// What a reply claims: the text between its last `<answer>` and `</answer>`, or the whole reply where there is none.
/// Surrounding white space and one closing full stop do not count.
pub fn stated_answer(reply: &str) -> &str {
    let tagged = reply.rsplit_once("<answer>").and_then(|(_, rest)| rest.split_once("</answer>"));
    let answer = tagged.map_or(reply, |(answer, _)| answer).trim();
    answer.strip_suffix('.').unwrap_or(answer)
}

/// Whether `reply` states `answer`, letter for letter but for upper and lower case.
pub fn is_correct(reply: &str, answer: &str) -> bool {
    stated_answer(reply).to_lowercase() == stated_answer(answer).to_lowercase()
}

struct Draft {
    question: String,
    answer: String,
    working: String,
    operands: String,
}

impl Draft {
    /// One of the wordings, with `{}` replaced by the operands as they are written in the question.
    fn ask(
        rng: &mut ChaCha8Rng,
        wordings: &[&str],
        operands: String,
        answer: impl ToString,
        working: String,
    ) -> Self {
        let question = wordings.choose(rng).expect("a family has wordings").replace("{}", &operands);
        Self { question, answer: answer.to_string(), working, operands }
    }
}

/// A number of exactly `digits` digits; a single digit may be 0.
fn number(rng: &mut ChaCha8Rng, digits: usize) -> u64 {
    let low = if digits == 1 { 0 } else { 10_u64.pow(digits as u32 - 1) };
    rng.random_range(low..10_u64.pow(digits as u32))
}

fn joined<T: ToString>(items: impl IntoIterator<Item = T>, by: &str) -> String {
    items.into_iter().map(|item| item.to_string()).collect::<Vec<_>>().join(by)
}

/// The digits of `n`, the lowest first, filled up with zeros.
fn columns(n: u64, digits: usize) -> impl Iterator<Item = u64> {
    (0..digits as u32).map(move |place| n / 10_u64.pow(place) % 10)
}

/// Column by column with carry: `47+85` is `7+5=12,1+4+8=13`.
fn add(rng: &mut ChaCha8Rng, difficulty: usize) -> Draft {
    let (a, b) = (number(rng, difficulty), number(rng, difficulty));
    let mut carry = 0;
    let steps = columns(a, difficulty).zip(columns(b, difficulty)).map(|(x, y)| {
        let total = carry + x + y;
        let step = if carry == 1 { format!("1+{x}+{y}={total}") } else { format!("{x}+{y}={total}") };
        carry = total / 10;
        step
    });
    let working = joined(steps, ",");
    let wordings = ["What is {}?", "Calculate {}.", "{}=?", "How much is {}?"];
    Draft::ask(rng, &wordings, format!("{a}+{b}"), a + b, working)
}

/// Column by column with borrowing: `52-37` is `12-7=5,4-3=1`.
fn subtract(rng: &mut ChaCha8Rng, difficulty: usize) -> Draft {
    let (x, y) = (number(rng, difficulty), number(rng, difficulty));
    let (a, b) = (x.max(y), x.min(y));
    let mut borrowed = 0;
    let steps = columns(a, difficulty).zip(columns(b, difficulty)).map(|(x, y)| {
        let lent = if x < y + borrowed { 10 } else { 0 };
        let top = x + lent - borrowed;
        borrowed = lent / 10;
        format!("{top}-{y}={}", top - y)
    });
    let working = joined(steps, ",");
    let wordings = ["What is {}?", "Calculate {}.", "{}=?", "How much is {}?"];
    Draft::ask(rng, &wordings, format!("{a}-{b}"), a - b, working)
}

/// Digit by digit with carry: `47*6` is `7*6=42,4*6+4=28`. The highest difficulty multiplies two digits by two.
fn multiply(rng: &mut ChaCha8Rng, difficulty: usize) -> Draft {
    let (a, b) = if difficulty < HARDEST {
        (number(rng, difficulty), number(rng, 1))
    } else {
        (number(rng, 2), number(rng, 2))
    };
    let working = if difficulty < HARDEST {
        let mut carry = 0;
        let steps = columns(a, difficulty).map(|x| {
            let total = x * b + carry;
            let step =
                if carry > 0 { format!("{x}*{b}+{carry}={total}") } else { format!("{x}*{b}={total}") };
            carry = total / 10;
            step
        });
        joined(steps, ",")
    } else {
        let (ones, tens) = (b % 10, b / 10);
        format!(
            "{a}*{ones}={},{a}*{tens}0={},{}+{}={}",
            a * ones,
            a * tens * 10,
            a * ones,
            a * tens * 10,
            a * b
        )
    };
    let wordings = ["What is {}?", "Calculate {}.", "{}=?", "Multiply: {}."];
    Draft::ask(rng, &wordings, format!("{a}*{b}"), a * b, working)
}

fn remainder(rng: &mut ChaCha8Rng, difficulty: usize) -> Draft {
    let b = rng.random_range(2..=9);
    let a = rng.random_range(b..=b * (4 * difficulty as u64) + 9);
    let working = format!("{b}*{}={},{a}-{}={}", a / b, a / b * b, a / b * b, a % b);
    let question = [
        format!("What is the remainder of {a} divided by {b}?"),
        format!("Divide {a} by {b}. What is left over?"),
        format!("{a} mod {b}=?"),
    ];
    let question = question.choose(rng).expect("three").clone();
    Draft { question, answer: (a % b).to_string(), working, operands: format!("{a},{b}") }
}

/// A list with plus and minus, worked from the left.
fn sum(rng: &mut ChaCha8Rng, difficulty: usize) -> Draft {
    let mut total = number(rng, if difficulty < 3 { 1 } else { 2 });
    let mut operands = total.to_string();
    let mut steps = Vec::new();
    for _ in 0..=difficulty.div_ceil(2) {
        let next = number(rng, if difficulty < 3 { 1 } else { 2 });
        let (sign, after) =
            if next <= total && rng.random_bool(0.5) { ('-', total - next) } else { ('+', total + next) };
        operands += &format!("{sign}{next}");
        steps.push(format!("{total}{sign}{next}={after}"));
        total = after;
    }
    Draft::ask(rng, &["What is {}?", "Work out {}.", "{}=?"], operands, total, steps.join(","))
}

fn largest(rng: &mut ChaCha8Rng, difficulty: usize) -> Draft {
    let digits = 1 + difficulty / 2;
    let items: Vec<u64> = (0..=difficulty).map(|_| number(rng, digits)).collect();
    let smallest = rng.random_bool(0.5);
    let better = |a: u64, b: u64| if smallest { a.min(b) } else { a.max(b) };
    let mut best = items[0];
    let steps = items[1..].iter().map(|&item| {
        best = better(best, item);
        best
    });
    let working = joined(steps, ",");
    let wordings: [&str; 2] = if smallest {
        ["Which is the smallest: {}?", "Find the smallest of {}."]
    } else {
        ["Which is the largest: {}?", "Find the largest of {}."]
    };
    let mut draft = Draft::ask(rng, &wordings, joined(&items, ","), best, working);
    draft.operands += if smallest { " smallest" } else { " largest" };
    draft
}

fn sort(rng: &mut ChaCha8Rng, difficulty: usize) -> Draft {
    let mut items: Vec<u64> = (0..difficulty + 2).map(|_| number(rng, 2)).collect();
    let operands = joined(&items, ",");
    // Insertion into a growing sorted list would be long; the tens first is enough of a plan for so small a model.
    items.sort_unstable();
    let working = format!("tens {}", joined(items.iter().map(|item| item / 10), ""));
    let wordings = ["Sort {}.", "Sort from small to large: {}.", "Put in order: {}."];
    Draft::ask(rng, &wordings, operands, joined(&items, ","), working)
}

/// Arithmetic sequences; from difficulty 4 on the step itself grows by the same amount each time.
fn sequence(rng: &mut ChaCha8Rng, difficulty: usize) -> Draft {
    let growth = if difficulty >= 4 { rng.random_range(1..=difficulty as i64) } else { 0 };
    let mut step = rng.random_range(1..=5 * difficulty as i64);
    let mut items = vec![rng.random_range(0..=30 * difficulty as i64)];
    let mut steps = Vec::new();
    for _ in 0..4 {
        let last = items[items.len() - 1];
        items.push(last + step);
        steps.push(step);
        step += growth;
    }
    let answer = items.pop().expect("five items");
    let last = items[items.len() - 1];
    let working = format!("{},{last}+{}={answer}", joined(&steps[..3], ","), steps[3]);
    let wordings = ["What comes next: {}?", "Continue: {}.", "Which number follows {}?"];
    Draft::ask(rng, &wordings, joined(items, ","), answer, working)
}

/// One to five steps of having, getting and losing things.
fn story(rng: &mut ChaCha8Rng, difficulty: usize) -> Draft {
    const NAMES: [&str; 10] = ["Tom", "Ann", "Ben", "Mia", "Leo", "Eva", "Max", "Ida", "Sam", "Zoe"];
    const THINGS: [&str; 10] =
        ["apples", "books", "coins", "eggs", "pens", "shells", "nuts", "stamps", "keys", "cards"];
    const GAINS: [&str; 3] = ["buys", "finds", "gets"];
    const LOSSES: [&str; 3] = ["loses", "sells", "gives away"];
    let name = NAMES.choose(rng).expect("names");
    let thing = THINGS.choose(rng).expect("things");
    let mut total = rng.random_range(1..=20_u64);
    let mut question = format!("{name} has {total} {thing}.");
    let mut operands = total.to_string();
    let mut steps = Vec::new();
    for _ in 0..difficulty {
        let amount = rng.random_range(1..=20_u64);
        let loses = amount <= total && rng.random_bool(0.5);
        let verb = if loses { LOSSES } else { GAINS }.choose(rng).expect("verbs").to_string();
        let (sign, after) = if loses { ('-', total - amount) } else { ('+', total + amount) };
        question += &format!(" {name} {verb} {amount}.");
        operands += &format!("{sign}{amount}");
        steps.push(format!("{total}{sign}{amount}={after}"));
        total = after;
    }
    question += &format!(" How many {thing} does {name} have now?");
    Draft { question, answer: total.to_string(), working: steps.join(","), operands }
}

fn weekday(rng: &mut ChaCha8Rng, difficulty: usize) -> Draft {
    const DAYS: [&str; 7] = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"];
    let start = rng.random_range(0..7_usize);
    let distance = rng.random_range(1..=6 * difficulty);
    let back = rng.random_bool(0.5);
    let rest = distance % 7;
    let day = |passed: usize| DAYS[(start + if back { 7 - passed } else { passed }) % 7];
    let weeks = if distance > 7 { format!("{distance}-{}={rest},", distance - rest) } else { String::new() };
    let working = weeks + &joined((0..=rest).map(day), ",");
    let direction = if back { "before" } else { "after" };
    let days = if distance == 1 { "1 day".to_owned() } else { format!("{distance} days") };
    let operands = format!("{days} {direction} {}", DAYS[start]);
    let wordings = ["Which day is {}?", "What day of the week is {}?"];
    Draft::ask(rng, &wordings, operands, day(rest), working)
}

fn alphabet(rng: &mut ChaCha8Rng, difficulty: usize) -> Draft {
    let distance = rng.random_range(difficulty as u8..=2 * difficulty as u8);
    let start = rng.random_range(b'a'..=b'z' - distance);
    let back = rng.random_bool(0.3);
    let (from, answer) = if back { (start + distance, start) } else { (start, start + distance) };
    let mut path: Vec<char> = (start..=start + distance).map(char::from).collect();
    if back {
        path.reverse();
    }
    let direction = if back { "before" } else { "after" };
    let places = if distance == 1 { "1 place".to_owned() } else { format!("{distance} places") };
    let operands = format!("{places} {direction} {}", char::from(from));
    let wordings = ["Which letter is {}?", "In the alphabet, what is {}?"];
    Draft::ask(rng, &wordings, operands, char::from(answer), joined(path, ""))
}

/// A word of `letters` letters that can be pronounced: there are more of them than a model can memorise.
fn word(rng: &mut ChaCha8Rng, letters: usize) -> Vec<char> {
    let vowel_first = rng.random_bool(0.3);
    let mut pick = |kind: &str| *kind.as_bytes().choose(rng).expect("letters") as char;
    (0..letters)
        .map(|at| pick(if (at % 2 == 0) == vowel_first { "aeiou" } else { "bcdfghklmnprstvwz" }))
        .collect()
}

fn letter(rng: &mut ChaCha8Rng, difficulty: usize) -> Draft {
    let word = word(rng, 2 + difficulty);
    let place = rng.random_range(1..=word.len());
    let working = joined((1..=place).map(|at| format!("{at}{}", word[at - 1])), ",");
    let operands = format!("letter {place} of {}", joined(&word, ""));
    let wordings = ["What is {}?", "Which is {}?", "Name {}."];
    Draft::ask(rng, &wordings, operands, word[place - 1], working)
}

fn count(rng: &mut ChaCha8Rng, difficulty: usize) -> Draft {
    let mut word = word(rng, 2 + difficulty);
    let counted = *word.choose(rng).expect("letters");
    for letter in &mut word {
        if rng.random_bool(0.25) {
            *letter = counted;
        }
    }
    let mut seen = 0;
    let steps = word.iter().map(|&each| {
        seen += usize::from(each == counted);
        format!("{each}{seen}")
    });
    let working = joined(steps, ",");
    let operands = format!("{counted} in {}", joined(&word, ""));
    let wordings = ["How often is the letter {}?", "Count the letter {}."];
    Draft::ask(rng, &wordings, operands, seen, working)
}

fn reverse(rng: &mut ChaCha8Rng, difficulty: usize) -> Draft {
    let mut letters = word(rng, 2 + difficulty);
    if rng.random_bool(0.2) {
        letters.shuffle(rng);
    }
    let working = joined(&letters, "-");
    let operands = joined(&letters, "");
    let wordings = ["Spell {} backwards.", "Reverse the word {}.", "Write {} from the end to the start."];
    Draft::ask(rng, &wordings, operands, joined(letters.iter().rev(), "-"), working)
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    #[test]
    fn every_working_leads_to_its_answer() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        for (family, name) in FAMILIES.iter().enumerate() {
            for difficulty in 1..=HARDEST {
                let mut held_out = 0;
                for _ in 0..400 {
                    let problem = Problem::new(family, difficulty, &mut rng);
                    check(&problem);
                    held_out += usize::from(problem.is_held_out());
                }
                assert!((1..100).contains(&held_out), "{name} {difficulty}: {held_out}");
            }
        }
    }

    /// Evaluates every equation of the working, and the question itself where it is one.
    fn check(problem: &Problem) {
        for equation in problem.working.split(',').filter(|step| step.contains('=')) {
            let (left, right) = equation.split_once('=').expect("an equation");
            assert_eq!(evaluate(left), right.parse::<i64>().expect("a number"), "{problem:?}");
        }
        if matches!(problem.family, "add" | "subtract" | "multiply" | "sum" | "story") {
            assert_eq!(evaluate(&problem.operands).to_string(), problem.answer, "{problem:?}");
        }
        assert!(is_correct(&problem.reply_with_working(), &problem.answer));
        assert!(is_correct(&format!(" {}.\n", problem.answer), &problem.answer));
        assert!(!is_correct(&format!("{}0", problem.answer), &problem.answer));
    }

    /// `+` and `-` from the left, after `*`.
    fn evaluate(expression: &str) -> i64 {
        let signed = expression.replace('-', "+-");
        let product =
            |term: &str| term.split('*').map(|n| n.parse::<i64>().expect("a number")).product::<i64>();
        signed.split('+').map(product).sum()
    }

    #[test]
    fn the_answer_tag_wins_over_the_rest() {
        assert_eq!(stated_answer("<think>3</think><answer> 12. </answer>"), "12");
        assert_eq!(stated_answer("<answer>1</answer> no, <answer>2</answer>"), "2");
        assert!(!is_correct("<answer>12", "12"));
    }
}
