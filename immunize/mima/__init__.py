"""Bi-level immunization of text-to-image models (arXiv 2412.15320).

To read in this order:

1. `immunize.mima.method`: options and losses of MIMA and its baselines.
2. `immunize.mima.outer_loop`: the loop that descends them.
3. `immunize.mima.inner_loop`: the attack on each concept, forwards and transposed.
4. `immunize.merge.closed_form`: the merge of the attacked models; `immunize.merge.build` builds it.
5. `immunize.mima.hypergradient`: the gradient through inner loop and merge.

`immunize.mima.deep` is the method whose attackers train for many steps. `immunize.mima.sampling`
draws the batches of both.
"""
