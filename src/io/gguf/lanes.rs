//! Eight numbers that the compiler turns into vector instructions, and the roundings that it can.

use std::array::from_fn;
use std::ops::{Add, AddAssign, Div, Mul, Neg, Sub};

pub(super) const LANES: usize = 8;

/// Adding it leaves no bits behind the point, for |x| < 2^22.
const SHIFT: f32 = 12_582_912.0;

/// The nearest integer, halves to the even one, for |x| < 2^22. A plain `round` would be a call of the C library on the x86-64
/// baseline.
#[inline(always)]
pub(super) fn nearest(x: f32) -> f32 {
    (x + SHIFT) - SHIFT
}

/// The integer part of x, 0 <= x < 2^22.
#[inline(always)]
pub(super) fn floor(x: f32) -> f32 {
    let near = nearest(x);
    if near > x { near - 1.0 } else { near }
}

/// The low byte of an integer |x| < 2^22. `as u8` saturates, which costs more than all else here.
#[inline(always)]
pub(super) fn byte(x: f32) -> u8 {
    (x + SHIFT).to_bits() as u8
}

#[inline(always)]
pub(super) fn clamp(x: f32, low: f32, high: f32) -> f32 {
    // Not f32::clamp: it asks for NaN.
    let x = if x < low { low } else { x };
    if x > high { high } else { x }
}

/// One number of each of eight runs.
#[derive(Clone, Copy)]
pub(super) struct Lanes(pub(super) [f32; LANES]);

impl Lanes {
    #[inline(always)]
    pub(super) fn all(x: f32) -> Self {
        Self([x; LANES])
    }

    #[inline(always)]
    pub(super) fn map(self, f: impl Fn(f32) -> f32) -> Self {
        Self(self.0.map(f))
    }

    #[inline(always)]
    pub(super) fn zip(self, other: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        Self(from_fn(|i| f(self.0[i], other.0[i])))
    }

    /// `yes` where self is greater than `than`.
    #[inline(always)]
    pub(super) fn greater(self, than: Self, yes: Self, no: Self) -> Self {
        Self(from_fn(|i| if self.0[i] > than.0[i] { yes.0[i] } else { no.0[i] }))
    }
}

macro_rules! lane_by_lane {
    ($($operator:ident $name:ident),*) => {$(
        impl $operator for Lanes {
            type Output = Self;
            #[inline(always)]
            fn $name(self, other: Self) -> Self {
                self.zip(other, |a, b| a.$name(b))
            }
        }
    )*};
}

lane_by_lane!(Add add, Sub sub, Mul mul, Div div);

impl AddAssign for Lanes {
    #[inline(always)]
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

impl Neg for Lanes {
    type Output = Self;
    #[inline(always)]
    fn neg(self) -> Self {
        self.map(|x| -x)
    }
}
