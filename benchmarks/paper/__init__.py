"""The paper in miniature: a tiny language with a known true preference, and every row of its comparison."""
