"""The noise process: schedule, objective, denoiser, samplers."""
