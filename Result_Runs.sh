#!/usr/bin/env bash
# The published set-ups, the paper's ablations, and a demo that needs no data: see the usage below
set -euo pipefail

usage() {
    cat <<'EOF'
usage: bash Result_Runs.sh NAME [more flags of main.py]
       bash Result_Runs.sh ablation SERIES DATASET [--seeds N] [--values V ...] [more flags of main.py]

  demo              MIC on the built-in rendered data set: CPU, no data, minutes
  cub200            CUB200-2011
  cars196           CARS196
  online_products   Stanford Online Products
  in-shop           In-Shop Clothes
  vehicle_id        PKU VehicleID
  all               the five published set-ups, one after the other
  flags NAME        print the flags of a set-up
  ablation          a series of runs over a flag: `bash Result_Runs.sh ablation --help` lists them

More flags are passed on and win over those of the set-up, for example
  bash Result_Runs.sh cub200 --source_path /data --gpu 1 --seed 2
Data sets are expected in ./Datasets, see docs/data.md; `python main.py --help` lists all flags.
EOF
}

if [[ $# -eq 0 || $1 == -h || $1 == --help ]]; then
    usage
    exit 0
fi
name=$1
shift
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
published=(--seed 0 --random_cluster_pick_p 0.2 --cluster_update_freq 3)

setup_flags() { # NAME: sets `flags` to main.py's flags of a set-up
    flags=(--dataset "$1" "${published[@]}")
    case $1 in
        demo)
            local amp=none # bfloat16 halves the time on a CPU with AVX-512 and makes other CPUs several times slower
            if grep -qs avx512 /proc/cpuinfo; then amp=bf16; fi
            flags=(--dataset shapes --not_pretrained --img_size 64 --amp "$amp" --lr 1e-3 --bs 28 --n_epochs 7
                --tau 5 --shared_num_classes 8 --random_cluster_pick_p 0 --adv_weights 500)
            ;;
        cub200) flags+=(--shared_num_classes 30 --adv_weights 2500 --task_p 1 0.8 --tau 50 --n_epochs 100) ;;
        cars196) flags+=(--shared_num_classes 150 --adv_weights 500 --task_p 1 0.8 --tau 60 --n_epochs 110) ;;
        in-shop) flags+=(--shared_num_classes 150 --adv_weights 250 --task_p 1 0.8 --tau 50 --n_epochs 70) ;;
        online_products | vehicle_id)
            flags+=(--shared_num_classes 50 --adv_weights 250 --task_p 1 0.5 --tau 20 35 --n_epochs 45)
            ;;
        *)
            echo "Result_Runs.sh: error: no set-up '$1'; one of demo, cub200, cars196, online_products, in-shop," \
                "vehicle_id; bash Result_Runs.sh --help says what else there is" >&2
            exit 2
            ;;
    esac
}

run() { # SET-UP [more flags], in place of this shell, so that a signal reaches the run
    local flags
    setup_flags "$1"
    if [[ $1 == demo ]]; then export CUDA_VISIBLE_DEVICES=''; fi # so that everyone sees the same figures
    exec "${PYTHON:-python}" "$here/main.py" "${flags[@]}" "${@:2}"
}

case $name in
    ablation)
        # -P: do not import another main.py from the current folder
        PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python}" -P -c '
import main
from report import ablation
from support.errors import set_up_output

set_up_output()
ablation.main(main.get_args_parser)' "$@"
        ;;
    all)
        failed=()
        # $! is the process id of the current run, and empty before the first one starts
        trap 'kill -TERM ${!:-} 2>/dev/null || true; wait ${!:-} || true; exit 143' TERM
        trap 'kill -HUP ${!:-} 2>/dev/null || true; wait ${!:-} || true; exit 129' HUP
        trap 'wait ${!:-} || true; exit 130' INT
        for each in cub200 cars196 online_products in-shop vehicle_id; do
            (run "$each" "$@") &
            wait $! && continue
            code=$?
            if ((code > 128)); then exit "$code"; fi # told to stop
            failed+=("$each")
        done
        if [[ ${#failed[@]} -gt 0 ]]; then
            echo "Result_Runs.sh: failed: ${failed[*]}" >&2
            exit 1
        fi
        ;;
    flags)
        setup_flags "${1:-}"
        printf '%q ' "${flags[@]}" "${@:2}"
        echo
        ;;
    *) run "$name" "$@" ;;
esac
