"""Attackers; every one keeps its whole trajectory.

``search``: every search of a learning rate or of other options. ``feature_attack``: what attackers
of feature extractors share; they are in ``probes`` and ``finetune``. ``diffusion.attack``: what
attackers of text-to-image models share; they are beside it. ``adapters``: LoRA for both.

A new attacker is a file beside its relatives and a file in ``conf/attacks``: a subclass of
`attacks.finetune.full.Adaptation` or `attacks.diffusion.attack.ConceptAttack` only says what moves.
"""
