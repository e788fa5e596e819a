"""`python -m sat_lightning` is `sat-lightning`."""

from sat_lightning.cli import main

if __name__ == "__main__":
    main()
