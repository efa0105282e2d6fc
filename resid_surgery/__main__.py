"""`python -m resid_surgery` is the command `resid-surgery`."""

from resid_surgery.cli.main import run

if __name__ == "__main__":
    run()
