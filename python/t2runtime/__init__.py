"""Transformer² for Hugging Face models: training experts, choosing them, answering in two passes.

    tasks, rewards, sources   questions, right answers, and the reward of a completion
    train                     REINFORCE with KL on one page
    adapt                     pass 1: by prompt, by classification expert, by few shots
    peft                      SVF as a method of the PEFT library, for its users and for TRL
    engine                    two passes over a batch with a mixture per request
    cli, commands             `t2 env | decompose | train | generate | inspect | bench | demo`

Uses the public names of t2kernels only. Nothing is imported here: `import t2runtime` is free.
"""
