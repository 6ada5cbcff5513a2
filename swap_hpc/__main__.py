"""`python -m swap_hpc`."""

from swap_hpc.cli import main

if __name__ == "__main__":
    main()
