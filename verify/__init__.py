"""attnproof"""
