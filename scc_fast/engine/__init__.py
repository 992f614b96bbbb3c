"""Engine: driver, session, encoders and CUDA graphs."""
