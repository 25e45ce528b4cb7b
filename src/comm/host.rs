//! Host data that other ranks may read after the rank that wrote it has left: messages, and the
//! inputs of started collectives.

use crate::device::{AnyBuffer, AnyRef, Cpu, DType};
use half::{bf16, f16};
use std::sync::Arc;

/// Host memory with an element type known at run time. Other threads may read it, unlike a rank's
/// buffers.
#[derive(Debug)]
pub(super) enum HostVec {
    F64(Arc<Vec<f64>>),
    F32(Arc<Vec<f32>>),
    BF16(Arc<Vec<bf16>>),
    F16(Arc<Vec<f16>>),
}

impl HostVec {
    pub(super) fn as_ref(&self) -> AnyRef<'_, Cpu> {
        match self {
            Self::F64(data) => AnyRef::F64(data.as_slice()),
            Self::F32(data) => AnyRef::F32(data.as_slice()),
            Self::BF16(data) => AnyRef::BF16(data.as_slice()),
            Self::F16(data) => AnyRef::F16(data.as_slice()),
        }
    }
}

impl HostVec {
    /// Decodes the little-endian elements of a message; none if its length is not a multiple of the
    /// element's size.
    pub(super) fn from_bytes(dtype: DType, bytes: &[u8]) -> Option<Self> {
        macro_rules! read {
            ($variant:ident, $element:ty) => {{
                let (elements, rest) = bytes.as_chunks::<{ size_of::<$element>() }>();
                let data = elements.iter().map(|bytes| <$element>::from_le_bytes(*bytes)).collect();
                rest.is_empty().then_some(Self::$variant(Arc::new(data)))
            }};
        }
        match dtype {
            DType::F64 => read!(F64, f64),
            DType::F32 => read!(F32, f32),
            DType::BF16 => read!(BF16, bf16),
            DType::F16 => read!(F16, f16),
        }
    }
}

/// Encodes elements, in little endian, as a message.
pub(super) fn to_bytes(data: AnyRef<'_, Cpu>) -> Vec<u8> {
    match data {
        AnyRef::F64(data) => data.iter().flat_map(|value| value.to_le_bytes()).collect(),
        AnyRef::F32(data) => data.iter().flat_map(|value| value.to_le_bytes()).collect(),
        AnyRef::BF16(data) => data.iter().flat_map(|value| value.to_le_bytes()).collect(),
        AnyRef::F16(data) => data.iter().flat_map(|value| value.to_le_bytes()).collect(),
    }
}

/// Copies the elements.
impl From<AnyRef<'_, Cpu>> for HostVec {
    fn from(data: AnyRef<'_, Cpu>) -> Self {
        match data {
            AnyRef::F64(data) => Self::F64(data.to_vec().into()),
            AnyRef::F32(data) => Self::F32(data.to_vec().into()),
            AnyRef::BF16(data) => Self::BF16(data.to_vec().into()),
            AnyRef::F16(data) => Self::F16(data.to_vec().into()),
        }
    }
}

/// Takes over the buffer's memory, without a copy. The memory returns to its pool after the last
/// use.
impl From<AnyBuffer<Cpu>> for HostVec {
    fn from(buffer: AnyBuffer<Cpu>) -> Self {
        match buffer {
            AnyBuffer::F64(buffer) => Self::F64(buffer.lend()),
            AnyBuffer::F32(buffer) => Self::F32(buffer.lend()),
            AnyBuffer::BF16(buffer) => Self::BF16(buffer.lend()),
            AnyBuffer::F16(buffer) => Self::F16(buffer.lend()),
        }
    }
}
