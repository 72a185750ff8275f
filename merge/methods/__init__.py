"""Ways to merge: each a pure function ``(base, models, coefficients) -> leaf`` of one tensor, in float32."""
