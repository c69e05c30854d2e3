"""What joins two networks of one architecture: permutations, rescalings and flips of sign, and the way between them.

Takes models and their groups. Gives verdicts, aligned and canonical copies, points between two. Never imports training,
reports or commands.
"""
