"""Lightning modules: what is trained and what is evaluated."""
