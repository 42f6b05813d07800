"""Self-contained diffusers-style pipelines. The first ones arrive in the next release."""
