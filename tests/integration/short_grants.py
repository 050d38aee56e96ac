"""``modelyard``, whose capture grants last seconds instead of an hour, so that a test sees several of them lapse."""

from modelyard.cli import main
from modelyard.deployer import converge

GRANT_S = 15

if __name__ == "__main__":
    converge.GRANT_S, converge.AGAIN_S = GRANT_S, 5
    main()
