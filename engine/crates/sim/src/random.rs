//! The one source of chance: everything that a run decides comes from its seed.

/// Deterministic numbers (xoshiro256**, seeded by splitmix64).
#[derive(Clone, Debug)]
pub struct Random([u64; 4]);

impl Random {
    /// The numbers of `seed`.
    pub fn new(seed: u64) -> Random {
        let mut state = seed;
        Random(core::array::from_fn(|_| {
            state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
            let mut z = state;
            z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            z ^ (z >> 31)
        }))
    }

    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        let s = &mut self.0;
        let result = s[1].wrapping_mul(5).rotate_left(7).wrapping_mul(9);
        let t = s[1] << 17;
        s[2] ^= s[0];
        s[3] ^= s[1];
        s[1] ^= s[2];
        s[0] ^= s[3];
        s[2] ^= t;
        s[3] = s[3].rotate_left(45);
        result
    }

    /// A number in `[0, bound)`; 0 when `bound` is 0. The bias is far below what a run could notice.
    pub fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.bits()) * u128::from(bound)) >> 64) as u64
    }

    /// A number in `[low, high)`.
    pub fn range(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high.saturating_sub(low))
    }

    /// True in `per_cent` of 100 cases.
    pub fn chance(&mut self, per_cent: u64) -> bool {
        self.below(100) < per_cent
    }

    /// One of `items`, which are not empty.
    pub fn pick<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        &items[self.below(items.len() as u64) as usize]
    }

    /// 16 random bytes.
    pub fn id(&mut self) -> [u8; 16] {
        let (a, b) = (self.bits().to_le_bytes(), self.bits().to_le_bytes());
        core::array::from_fn(|i| if i < 8 { a[i] } else { b[i - 8] })
    }
}
