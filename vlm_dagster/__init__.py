"""Versioned late materialization for recommender training."""
