"""Foundation models that the systems build on."""
