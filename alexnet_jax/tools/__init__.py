"""Tools around a network: summary, weight conversion, prediction."""
