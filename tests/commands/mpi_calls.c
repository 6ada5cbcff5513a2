/* Counts the calls by which a process communicates, through MPI's profiling interface.
 *
 * The library is preloaded, so that its MPI_ functions are found before those of libmpi. Each adds
 * one to the count and calls the PMPI_ function of the same name, which does the work. */
#include <mpi.h>

static volatile long calls;
long counted_mpi_calls(void) { return calls; }

#define COUNTED(name, parameters, arguments) \
  int MPI_##name parameters { __sync_fetch_and_add(&calls, 1); return PMPI_##name arguments; }

COUNTED(Allreduce, (const void *a, void *b, int n, MPI_Datatype t, MPI_Op o, MPI_Comm c), (a, b, n, t, o, c))
COUNTED(Iallreduce, (const void *a, void *b, int n, MPI_Datatype t, MPI_Op o, MPI_Comm c, MPI_Request *r), (a, b, n, t, o, c, r))
COUNTED(Reduce, (const void *a, void *b, int n, MPI_Datatype t, MPI_Op o, int d, MPI_Comm c), (a, b, n, t, o, d, c))
COUNTED(Bcast, (void *a, int n, MPI_Datatype t, int d, MPI_Comm c), (a, n, t, d, c))
COUNTED(Barrier, (MPI_Comm c), (c))
COUNTED(Allgather, (const void *a, int n, MPI_Datatype t, void *b, int m, MPI_Datatype u, MPI_Comm c), (a, n, t, b, m, u, c))
COUNTED(Allgatherv, (const void *a, int n, MPI_Datatype t, void *b, const int m[], const int d[], MPI_Datatype u, MPI_Comm c), (a, n, t, b, m, d, u, c))
COUNTED(Gather, (const void *a, int n, MPI_Datatype t, void *b, int m, MPI_Datatype u, int d, MPI_Comm c), (a, n, t, b, m, u, d, c))
COUNTED(Gatherv, (const void *a, int n, MPI_Datatype t, void *b, const int m[], const int o[], MPI_Datatype u, int d, MPI_Comm c), (a, n, t, b, m, o, u, d, c))
COUNTED(Scatter, (const void *a, int n, MPI_Datatype t, void *b, int m, MPI_Datatype u, int d, MPI_Comm c), (a, n, t, b, m, u, d, c))
COUNTED(Send, (const void *a, int n, MPI_Datatype t, int d, int g, MPI_Comm c), (a, n, t, d, g, c))
COUNTED(Isend, (const void *a, int n, MPI_Datatype t, int d, int g, MPI_Comm c, MPI_Request *r), (a, n, t, d, g, c, r))
COUNTED(Recv, (void *a, int n, MPI_Datatype t, int d, int g, MPI_Comm c, MPI_Status *s), (a, n, t, d, g, c, s))
COUNTED(Irecv, (void *a, int n, MPI_Datatype t, int d, int g, MPI_Comm c, MPI_Request *r), (a, n, t, d, g, c, r))
COUNTED(Probe, (int d, int g, MPI_Comm c, MPI_Status *s), (d, g, c, s))
COUNTED(Iprobe, (int d, int g, MPI_Comm c, int *f, MPI_Status *s), (d, g, c, f, s))
COUNTED(Comm_split, (MPI_Comm c, int o, int k, MPI_Comm *n), (c, o, k, n))
COUNTED(Comm_create_group, (MPI_Comm c, MPI_Group g, int t, MPI_Comm *n), (c, g, t, n))
COUNTED(Comm_dup, (MPI_Comm c, MPI_Comm *n), (c, n))
