#!/usr/bin/env bash
# A sweep on a Ray cluster that is running, given in as a job: it goes on when this terminal closes.
#
#   HEAD=http://head.example:8265 bash scripts/cluster/ray_job.sh -m +sweep=pruners_digits
#
# Arguments are fedray's. HEAD is the address of the cluster's dashboard, which takes jobs.
#
# Authentication: a cluster that asks for a token refuses what comes without. Export RAY_AUTH_MODE=token here, with the
# cluster's token in RAY_AUTH_TOKEN or in the file that RAY_AUTH_TOKEN_PATH names; `ray get-auth-token` prints it on the
# head. In a network that you trust, with tokens switched off on all nodes: RAY_AUTH_MODE=disabled. Inside the job Ray
# sets RAY_ADDRESS and RAY_AUTH_MODE by itself, so fedray is told neither.
#
# Shared storage: the launcher, the drivers and whoever reads the results need one view of the runs. OUTPUTS is a folder
# that every node sees under the same path, such as NFS; on one machine any folder does. Data are found by data.path,
# which has to be the same path on the node of the launcher; it hands them to the others through Ray.
#
# fedray has to be installed on the nodes, of one version with one Python and one Ray. `--working-dir` would copy this
# folder to the cluster instead, without what it needs.
set -euo pipefail

: "${HEAD:?export HEAD=http://HEAD:8265, the dashboard of the cluster}"
: "${OUTPUTS:?export OUTPUTS=FOLDER, on storage that all nodes share}"

exec ray job submit --address "$HEAD" --entrypoint-num-cpus 1 -- \
  python -m fedray "$@" "hydra.sweep.dir='$OUTPUTS/\${name}/sweep'" "hydra.run.dir='$OUTPUTS/\${name}/\${now:%Y-%m-%d_%H-%M-%S}'"
