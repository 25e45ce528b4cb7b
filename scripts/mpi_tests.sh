#!/usr/bin/env bash
# Runs the tests over MPI: 1, 2, 3 and 4 processes, and jobs that lose a rank. Needs an MPI library
# with mpirun, and libclang: on Debian libopenmpi-dev, openmpi-bin and libclang-dev.
set -euo pipefail
cd "$(dirname "$0")/.."
exec cargo test --features mpi --test mpi "$@"
