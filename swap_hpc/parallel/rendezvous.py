"""What torch.distributed needs to know to connect ranks that mpirun or srun started."""

import os
import socket

from swap_hpc.errors import UserError
from swap_hpc.parallel.grid import node_of
from swap_hpc.parallel.teams import Team


def distributed_environment(world: Team) -> dict[str, str]:
    """Return the variables from which torch.distributed's `env://` connects MPI's ranks.

    Collective. Call it before `torch.distributed.init_process_group`:

        os.environ.update(swap_hpc.distributed_environment(world))

    Args:
        world: all ranks that are to be connected.

    Returns:
        `RANK` and `WORLD_SIZE`, as in `world`; `LOCAL_RANK` and `LOCAL_WORLD_SIZE`, among the ranks
        of this node; and `MASTER_ADDR` and `MASTER_PORT`: what the first rank has set, else its
        host's name (127.0.0.1 where there is one node) and a free port.

    Raises:
        UserError: on all ranks, one of them does not know the first rank's host by its name.
    """
    with node_of(world) as node:
        local_rank, ranks_here = node.rank, node.size
    address, port = world.broadcast(_first_ranks(one_node=ranks_here == world.size))
    world.agree(lambda: _check_known(address))
    return {
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
        "RANK": str(world.rank),
        "WORLD_SIZE": str(world.size),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(ranks_here),
    }


def _first_ranks(one_node: bool) -> tuple[str, str]:
    """Return the address and the port at which torch is to listen, if this is the first rank."""
    address = "127.0.0.1" if one_node else socket.gethostname()
    with socket.socket() as unused:
        unused.bind(("", 0))
        port = unused.getsockname()[1]
    return os.environ.get("MASTER_ADDR", address), os.environ.get("MASTER_PORT", str(port))


def _check_known(host: str) -> None:
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        raise UserError(
            f"{socket.gethostname()} does not know the first rank's host by its name, {host}: "
            "export MASTER_ADDR=ADDRESS, as the hosts reach each other"
        ) from None
