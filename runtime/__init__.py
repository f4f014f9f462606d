"""Serve time: requests in, tokens out. Scheduler, KV cache, executors, sampler, Triton adapter."""
