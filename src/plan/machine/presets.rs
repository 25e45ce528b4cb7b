//! Machines with published rates.
