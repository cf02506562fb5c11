"""Finding and judging policies: what users do with a prepared model, by its public names."""
