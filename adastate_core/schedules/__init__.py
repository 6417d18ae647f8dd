"""Noise, noise levels, samplers, and chunks that are denoised together."""
