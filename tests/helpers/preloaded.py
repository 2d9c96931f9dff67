"""Imported by the server that test processes are forked from: what all of them need is made once,
here.
"""

import os

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork

import executor_cases  # noqa: F401
from mima_examples import model
from team_cases import three_concepts

model()
three_concepts()
