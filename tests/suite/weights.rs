//! Checkpoints: reading parts, and refusing bad files.
