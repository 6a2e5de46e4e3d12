"""The search for a kernel's worst input, and what is made of a failure: minimal input, words, a script."""
