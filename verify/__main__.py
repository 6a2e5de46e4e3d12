"""``python -m attnproof``: the command line where its script is not on the path."""

from attnproof.cli import main

if __name__ == "__main__":
    main()
