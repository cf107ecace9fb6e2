"""Training of drafters: small networks that propose tokens for a target model to verify."""
