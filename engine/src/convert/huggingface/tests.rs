//! Small checkpoints, made here.
