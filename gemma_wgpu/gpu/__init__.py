"""The GPU seam: one interface, one backend a platform."""
