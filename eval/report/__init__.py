"""Views of records: HTML report, leaderboard, comparison, terminal summary. Nothing here computes a
result.
"""
