"""Run Gemma 3 on any GPU: hand-written WGSL through wgpu, natively and in the browser."""
