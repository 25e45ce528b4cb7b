//! Products of bytes, signed and unsigned, as the instruction dp4a computes them.

mod common;
#[path = "common/kernels.rs"]
mod kernels;

use common::{allocate, streams};
use cuda_standin::{driver::*, error::*};
use kernels::{function, image, launch, load};

const SOURCE: &str = r#"
extern "C" __global__ void bytes(long long a, long long b, long long c, int* y) {
  y[0] = __dp4a((int)a, (int)b, (int)c);
  y[1] = __dp4a((unsigned)a, (unsigned)b, (unsigned)c);
}
"#;

#[test]
fn four_products_are_added_to_a_sum_that_wraps() {
    let (stream, _) = streams(0);
    let bytes = function(load(&image(SOURCE).unwrap()), c"bytes");
    let y = allocate(8, stream);
    for (a, b, c) in [
        ([1, 2, 3, 4], [5, 6, 7, 8], 100),
        ([128, 255, 127, 0], [255, 128, 127, 9], 0),
        ([128; 4], [128; 4], i32::MAX),
        ([255; 4], [127; 4], i32::MIN),
    ] {
        let word = |bytes: [u8; 4]| u64::from(u32::from_le_bytes(bytes));
        let mut arguments = [word(a), word(b), u64::from(c as u32), y as u64];
        assert_eq!(launch(bytes, stream, [1, 1, 0], &mut arguments), SUCCESS);
        let mut got = [0; 8];
        assert_eq!(unsafe { cuMemcpyDtoHAsync_v2(got.as_mut_ptr(), y, 8, stream) }, SUCCESS);
        assert_eq!(unsafe { cuStreamSynchronize(stream) }, SUCCESS);
        let sum = |of: fn(u8) -> i32| {
            a.iter().zip(b).fold(c, |sum, (a, b)| sum.wrapping_add(of(*a) * of(b))).to_ne_bytes()
        };
        let want = [sum(|byte| i32::from(byte as i8)), sum(i32::from)];
        assert_eq!(got.as_chunks::<4>().0, want, "{a:?} {b:?} {c}");
    }
}
