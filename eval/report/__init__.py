"""Views of records: report, leaderboard, comparison, summary. Nothing in here computes a result."""
