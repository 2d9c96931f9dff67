"""Everything the three nouns (immunizers, attackers, metrics) run on."""
