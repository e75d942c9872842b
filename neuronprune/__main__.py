"""`python -m neuronprune`, the command."""
from neuronprune.cli import main
if __name__ == "__main__": main()
