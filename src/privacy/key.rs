//! The secret key of a run, and the streams of random numbers that it determines.

use crate::{
    comm::Group,
    error::{Error, Result},
    kernels::Backend,
    security::{Policy, Reach},
};
use chacha20::{
    ChaCha20,
    cipher::{KeyIvInit, StreamCipher, StreamCipherSeek},
};
use hkdf::Hkdf;
use sha2::Sha256;
use std::{fmt, ops::Range};
use zeroize::Zeroizing;

const OP: &str = "run key";

/// The secret key of one start of a run. Samples and noise are functions of it, so who knows it can
/// remove the noise.
///
/// Every start draws a new key, and no checkpoint has it. If two starts added the same noise to
/// different sums, the difference of the released gradients would be that of the sums.
///
/// The memory of the key is overwritten when the key is dropped, but not that of the tensors in
/// which [`RunKey::agree`] sent it.
pub struct RunKey {
    key: Zeroizing<[u8; 32]>,
    is_secret: bool,
}

impl fmt::Debug for RunKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.is_secret { "RunKey(secret)" } else { "RunKey(known)" })
    }
}

impl RunKey {
    /// Draws a key on rank 0 from the operating system, and sends it to the other ranks. Every rank
    /// of the group calls this. Collectives: those of [`Group::broadcast_bytes`].
    ///
    /// ```
    /// use shardwise::{launch, privacy::{PoissonSampler, RunKey}};
    /// let batches = launch::threads(2, |world| {
    ///     let key = RunKey::agree(&world)?;
    ///     assert!(key.is_secret());
    ///     Ok(PoissonSampler::new(&key, 1000, 0.1)?.batch(0))
    /// })?;
    /// assert_eq!(batches[0], batches[1]);
    /// # Ok::<(), shardwise::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::NotEncrypted`] when the group may be on several machines and its transport encrypts
    /// nothing, even if the policy is [`Policy::Any`]. [`Policy::TrustedNetwork`] allows plaintext
    /// in that network. When the operating system has no random numbers. When a rank calls
    /// something else or is lost.
    #[track_caller]
    pub fn agree<B: Backend>(group: &Group<B>) -> Result<Self> {
        let communicator = group.communicator();
        if group.size() > 1 && communicator.channel().reach == Reach::Network {
            let policy = match communicator.policy() {
                Policy::Any => Policy::RequireEncrypted,
                policy => policy,
            };
            policy.admit("the transport of the run key", communicator.channel(), None)?;
        }
        let mut own = Zeroizing::new([0; 32]);
        // On a device without values, a broadcast returns the bytes of the rank itself.
        if group.rank() == 0 || !B::HAS_VALUES {
            getrandom::fill(&mut *own).map_err(|error| Error::invalid(OP, error.to_string()))?;
        }
        let received = Zeroizing::new(group.broadcast_bytes(0, &*own)?);
        if received.len() != own.len() {
            return Err(Error::sizes(
                OP,
                "the length of the key",
                received.len(),
                "the wanted one",
                own.len(),
            ));
        }
        own.copy_from_slice(&received);
        Ok(Self { key: own, is_secret: true })
    }

    /// Returns a key that anybody can compute from the seed, for tests and for comparisons of runs.
    /// What is released with it has no privacy.
    ///
    /// ```
    /// use shardwise::privacy::RunKey;
    /// let key = RunKey::known_without_privacy(7);
    /// assert_eq!((key.is_secret(), format!("{key:?}")), (false, "RunKey(known)".into()));
    /// ```
    pub fn known_without_privacy(seed: u64) -> Self {
        let key = derive(&seed.to_le_bytes(), b"shardwise privacy v1 known key");
        Self { key, is_secret: false }
    }

    /// Whether the key was drawn by [`RunKey::agree`].
    pub fn is_secret(&self) -> bool {
        self.is_secret
    }

    /// Returns a public name of the key, from which the key cannot be computed.
    pub(super) fn tag(&self) -> String {
        let tag = derive(&*self.key, b"shardwise privacy v1 tag");
        tag[..8].iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// Returns the stream of a purpose and a name.
    pub(super) fn stream(&self, purpose: &'static str, name: &str) -> Stream {
        let info = [b"shardwise privacy v1 ", purpose.as_bytes(), b"\0", name.as_bytes()].concat();
        Stream(derive(&*self.key, &info))
    }
}

/// 32 bytes of HKDF-SHA256 (RFC 5869) without salt.
fn derive(secret: &[u8], info: &[u8]) -> Zeroizing<[u8; 32]> {
    let mut key = Zeroizing::new([0; 32]);
    Hkdf::<Sha256>::new(None, secret)
        .expand(info, &mut *key)
        .expect("HKDF-SHA256 gives up to 8160 bytes, and 32 are asked for");
    key
}

/// Random numbers by step and index: the key stream of ChaCha20 (RFC 8439).
///
/// The nonce is the step, 8 bytes, and the number of the block of [`BYTES`], 4 bytes. So no two
/// indices have the same bytes.
pub(super) struct Stream(Zeroizing<[u8; 32]>);

/// The number of bytes that a nonce is used for: half of those that its counter of 32 bits allows.
const BYTES: u64 = 1 << 37;

/// The number of indices whose bytes are computed at once.
const CHUNK: u64 = 1024;

impl Stream {
    /// Calls `f` with each index of a range and its number at a step.
    pub(super) fn numbers(&self, step: u64, indices: Range<u64>, mut f: impl FnMut(u64, u64)) {
        self.words(step, indices, |at, [number]: [u64; 1]| f(at, number));
    }

    /// Calls `f` with each index of a range and its N numbers at a step. N is a power of two.
    pub(super) fn words<const N: usize>(
        &self,
        step: u64,
        indices: Range<u64>,
        mut f: impl FnMut(u64, [u64; N]),
    ) {
        const { assert!(N.is_power_of_two() && N <= 4) };
        let width = 8 * N as u64;
        let mut buffer =
            Zeroizing::new(vec![0_u8; (width * CHUNK.min(indices.end - indices.start)) as usize]);
        let of_nonce = BYTES / width;
        let mut at = indices.start;
        while at < indices.end {
            // A chunk ends where the next nonce begins.
            let (high, low) = (at / of_nonce, at % of_nonce);
            let count = CHUNK.min(indices.end - at).min(of_nonce - low);
            let mut nonce = [0; 12];
            nonce[..8].copy_from_slice(&step.to_le_bytes());
            nonce[8..].copy_from_slice(&(high as u32).to_le_bytes());
            let mut cipher = ChaCha20::new((&*self.0).into(), (&nonce).into());
            let bytes = &mut buffer[..(count * width) as usize];
            bytes.fill(0);
            cipher.seek(low * width);
            cipher.apply_keystream(bytes);
            for (index, words) in (at..at + count).zip(bytes.chunks_exact(8 * N)) {
                let word = |word| u64::from_le_bytes(std::array::from_fn(|byte| words[8 * word + byte]));
                f(index, std::array::from_fn(word));
            }
            at += count;
        }
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;
    use crate::{
        device::{Cpu, Meta},
        launch,
    };

    fn bytes(hex: &str) -> Vec<u8> {
        let digits: Vec<_> = hex.chars().filter_map(|digit| digit.to_digit(16)).collect();
        digits.chunks_exact(2).map(|pair| (16 * pair[0] + pair[1]) as u8).collect()
    }

    /// RFC 8439, section 2.3.2: key 00 to 1f, nonce 000000090000004a00000000, block 1.
    #[test]
    fn numbers_are_the_key_stream_of_the_rfc() {
        let stream = Stream(Zeroizing::new(std::array::from_fn(|at| at as u8)));
        let step = u64::from_le_bytes([0, 0, 0, 9, 0, 0, 0, 0x4a]);
        let wanted = bytes(
            "10 f1 e7 e4 d1 3b 59 15 50 0f dd 1f a3 20 71 c4 c7 d1 f4 c7 33 c0 68 03 04 22 aa 9a c3 d4 6c 4e \
             d2 82 64 46 07 9f aa 09 14 c2 d7 05 d9 8b 02 a2 b5 12 9c d1 de 16 4e b9 cb d0 83 e8 a2 50 3c 4e",
        );
        let (mut numbers, mut words) = (Vec::new(), Vec::new());
        stream.numbers(step, 8..16, |at, number| {
            assert_eq!(at, 8 + numbers.len() as u64 / 8);
            numbers.extend(number.to_le_bytes());
        });
        stream.words(step, 2..4, |_, four: [u64; 4]| words.extend(four.map(u64::to_le_bytes).concat()));
        assert_eq!((numbers, words), (wanted.clone(), wanted));
    }

    /// RFC 5869, appendix A.3: no salt and no info. The first 32 of its 42 bytes.
    #[test]
    fn keys_are_derived_as_in_the_rfc() {
        let wanted = bytes("8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d");
        assert_eq!(derive(&[0x0b; 22], &[]).to_vec(), wanted);
    }

    #[test]
    fn streams_go_on_where_a_nonce_ends() {
        let stream = RunKey::known_without_privacy(1).stream("test", "");
        let border = BYTES / 8;
        let range = border - 1500..border + 1500;
        let mut all = Vec::new();
        stream.numbers(3, range.clone(), |at, number| all.push((at, number)));
        assert!(all.iter().map(|(at, _)| *at).eq(range));
        for at in [border - 1025, border - 1, border, border + 1, border + 1024] {
            stream.numbers(3, at..at + 1, |at, number| assert!(all.contains(&(at, number))));
        }
        // The next nonce does not repeat the bytes of the first one.
        stream.numbers(3, 0..1500, |at, number| assert_ne!(all[1500 + at as usize].1, number));
        stream.numbers(3, u64::MAX - 2..u64::MAX, |_, number| {
            assert!(all.iter().all(|(_, other)| *other != number))
        });
        stream.numbers(3, 5..5, |_, _| panic!("there is no index"));
    }

    #[test]
    fn keys_purposes_names_and_steps_have_their_own_numbers() {
        let first = |stream: Stream, step: u64| {
            let mut first = 0;
            stream.numbers(step, 0..1, |_, number| first = number);
            first
        };
        let key = RunKey::known_without_privacy(1);
        let mut seen = vec![
            first(RunKey::known_without_privacy(2).stream("noise", "a"), 0),
            first(key.stream("noise", "a"), 0),
            first(key.stream("noise", "a"), 1),
            first(key.stream("noise", "b"), 0),
            first(key.stream("sample", "a"), 0),
        ];
        assert_eq!(seen[1], first(RunKey::known_without_privacy(1).stream("noise", "a"), 0));
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len(), 5);
    }

    #[test]
    fn ranks_agree_on_a_new_key() {
        let keys = || launch::threads(3, |world| Ok(RunKey::agree(&world)?.key.to_vec())).unwrap();
        let (one, other) = (keys(), keys());
        assert!(one.len() == 3 && one.iter().all(|key| *key == one[0]));
        assert_ne!(one[0], other[0]);
        assert_ne!(one[0], [0; 32]);
        let group = Group::solo(&Cpu::new());
        let key = RunKey::agree(&group).unwrap();
        assert_eq!((key.is_secret(), format!("{key:?}")), (true, "RunKey(secret)".into()));
        let (planned, _) = Group::planned(&Meta::new(), 1, 4).unwrap();
        assert_ne!(RunKey::agree(&planned).unwrap().key.to_vec(), [0; 32]);
    }
}
