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

More flags are passed on and win over those of the set-up, for example
  bash Result_Runs.sh cub200 --source_path /data --gpu 1 --seed 2
Data sets are expected in ./Datasets, see README.md; `python main.py --help` lists all flags.

An ablation trains one run for each value of a flag and each of N seeds (default 1), with the set-up of the data set
(shapes: the demo's; your own: the defaults and your flags) and then compares them: a table, and ablation_SERIES.csv and
ablation_SERIES.svg beside the runs. Started again it leaves out what is done and goes on with what was interrupted.
SERIES is
  clusters      --shared_num_classes: 5 10 20 30 50 100 150 200 250 300
  interval      --cluster_update_freq, the epochs between two minings: 1 3 5 10 20 50
  dim           --embed_sizes, of the Shared embedding: 0 64 128 256 512 1024; 0 is the plain margin-loss baseline
  adversarial   --adv_weights: 0, and on for the weight of the set-up
  standardise   --cluster_mode: no_norm mean mstd
  mining        whether mining helps: margin, the plain margin-loss baseline; margin_steps, it with as many steps of the
                optimiser as MIC takes, in more epochs; mic; no_adversarial, MIC with --adv_weights 0; no_norm, MIC with
                --cluster_mode no_norm. Ends with the differences to the first of them, paired by seed
--values runs others than these, for example a smaller series on a CPU:
  bash Result_Runs.sh ablation clusters shapes --values 4 8 16 --seeds 2 --n_epochs 4
EOF
}

if [[ $# -eq 0 || $1 == -h || $1 == --help ]]; then
    usage
    exit 0
fi
name=$1
shift
here="$(dirname "${BASH_SOURCE[0]}")"
published=(--seed 0 --random_cluster_pick_p 0.2 --cluster_update_freq 3)

run() { "${PYTHON:-python}" "$here/main.py" "$@"; }

fail() {
    echo "Result_Runs.sh: error: $*" >&2
    exit 2
}

cub200() {
    run --dataset cub200 "${published[@]}" --shared_num_classes 30 --adv_weights 2500 --task_p 1 0.8 \
        --tau 50 --n_epochs 100 "$@"
}
cars196() {
    run --dataset cars196 "${published[@]}" --shared_num_classes 150 --adv_weights 500 --task_p 1 0.8 \
        --tau 60 --n_epochs 110 "$@"
}
online_products() {
    run --dataset online_products "${published[@]}" --shared_num_classes 50 --adv_weights 250 --task_p 1 0.5 \
        --tau 20 35 --n_epochs 45 "$@"
}
in-shop() {
    run --dataset in-shop "${published[@]}" --shared_num_classes 150 --adv_weights 250 --task_p 1 0.8 \
        --tau 50 --n_epochs 70 "$@"
}
vehicle_id() {
    run --dataset vehicle_id "${published[@]}" --shared_num_classes 50 --adv_weights 250 --task_p 1 0.5 \
        --tau 20 35 --n_epochs 45 "$@"
}
demo() {
    # Without a GPU, so that everyone sees the same figures
    CUDA_VISIBLE_DEVICES='' run --dataset shapes --not_pretrained --img_size 64 --amp bf16 --lr 1e-3 --bs 56 --n_epochs 16 \
        --shared_num_classes 8 --random_cluster_pick_p 0 --adv_weights 500 "$@"
}

plan_mining() {
    # For a set-up with flags: the --n_epochs and --tau, rounded up, in which the Class task alone takes as many steps as
    # both tasks; and a 0 for each adversarial direction. Refuses flags with which two of the series would be the same
    run() {
        "${PYTHON:-python}" -c '
import fractions, math, sys
sys.path[0] = sys.argv.pop(1)
import main
parser = main.get_args_parser()
args = main.check_args(parser.parse_args(sys.argv[1:]), parser)
steps = sum(fractions.Fraction(str(p)) for p in args.task_p)  # of an iteration; --task_p 1 0 takes 1
if 0 in args.task_p:
    parser.error("--task_p: the series mining needs steps of both tasks")
if not all(args.adv_weights):
    parser.error("--adv_weights 0: is no_adversarial, one of the series mining; give weights above 0")
if args.cluster_mode == "no_norm":
    parser.error("--cluster_mode no_norm: is one of the series mining; give mean or mstd")
if args.scheduler == "exp":
    parser.error("--scheduler exp: would decay further in margin_steps; give step or none")
epochs = [math.ceil(steps * epoch) for epoch in [args.n_epochs, *args.tau]]
print("--n_epochs", epochs[0], "--tau", *epochs[1:])
print(*[0] * len(args.adversarial))' "$here" "$@"
    }
    "$@"
}

ablation() {
    [[ $# -ge 2 ]] || fail "give the series and the data set: bash Result_Runs.sh ablation SERIES DATASET"
    local series=$1 dataset=$2 values flag seeds=1 first_seed=1 save_path=./Training_Results prefix=ablation_$1
    local own=() flags=() failed=() runs=() setup ablated value seed status table candidate shown plan zeros reference=
    case $series in
        clusters) flag=shared_num_classes values=(5 10 20 30 50 100 150 200 250 300) ;;
        interval) flag=cluster_update_freq values=(1 3 5 10 20 50) ;;
        dim) flag=embed_sizes values=(0 64 128 256 512 1024) ;;
        adversarial) flag=adv_weights values=(0 on) ;;
        standardise) flag=cluster_mode values=(no_norm mean mstd) ;;
        mining) flag='' values=(margin margin_steps mic no_adversarial no_norm) ;;
        *) fail "no series '$series'; one of clusters, interval, dim, adversarial, standardise, mining" ;;
    esac
    shift 2
    while [[ $# -gt 0 ]]; do
        case $1 in
            --seeds) seeds=${2:-} && shift ;;
            --save_path) save_path=${2:-} && shift ;;
            --savename) prefix=${2:-} && shift ;;
            --values) while [[ $# -gt 1 && $2 != --* ]]; do own+=("$2") && shift; done ;;
            -h | --help) usage && exit 0 ;;
            --seed | --dataset | --resume | --seed=* | --dataset=* | --resume=* | --seeds=* | --values=* | --save_path=* | --savename=*)
                fail "$1 does not go with an ablation: give --seeds N, --values V ..., --save_path FOLDER, --savename NAME" ;;
            *) flags+=("$1") ;;
        esac
        [[ $# -eq 0 ]] || shift
    done
    [[ $seeds =~ ^[1-9][0-9]*$ ]] || fail "--seeds '$seeds': give how many runs to train for each value"
    [[ -n $save_path && -n $prefix ]] || fail "--save_path and --savename take a value"
    [[ ${#own[@]} -eq 0 ]] || values=("${own[@]}")
    case $dataset in
        cub200 | cars196 | online_products | in-shop | vehicle_id) setup=("$dataset") first_seed=0 ;;
        shapes) setup=(demo) ;;
        *) setup=(run --dataset "$dataset") ;;
    esac
    table="$save_path/$dataset/$prefix"
    for candidate in "$table.csv" "$table.svg"; do
        [[ ! -e $candidate || -n $(compgen -G "${table}_*_seed*" || true) ]] || fail "$candidate exists already, and is of no series"
    done
    if [[ $series == mining ]]; then
        for value in "${values[@]}"; do
            [[ " margin margin_steps mic no_adversarial no_norm " == *" $value "* ]] ||
                fail "no value '$value' of mining; some of margin, margin_steps, mic, no_adversarial, no_norm"
        done
        plan=$(plan_mining "${setup[@]}" ${flags[@]+"${flags[@]}"}) || exit $?
        zeros=${plan#*$'\n'} plan=${plan%%$'\n'*}
    fi
    for value in "${values[@]}"; do
        ablated=(--$flag "$value")
        case $series-$value in
            mining-margin) read -ra ablated <<<"--task_p 1 0 --adv_weights $zeros" ;;
            mining-margin_steps) read -ra ablated <<<"--task_p 1 0 --adv_weights $zeros $plan" ;;
            mining-mic) ablated=() ;;
            mining-no_adversarial) read -ra ablated <<<"--adv_weights $zeros" ;;
            mining-no_norm) ablated=(--cluster_mode no_norm) ;;
            dim-0) ablated=(--task_p 1 0 --adv_weights 0) ;;
            dim-*) ablated=(--embed_sizes 128 "$value") ;;
            adversarial-on) ablated=() ;;
        esac
        for ((seed = first_seed; seed < first_seed + seeds; seed++)); do
            echo "== $series $value, seed $seed"
            status=0
            "${setup[@]}" ${flags[@]+"${flags[@]}"} ${ablated[@]+"${ablated[@]}"} --seed "$seed" --save_path "$save_path" \
                --savename "${prefix}_${value}_seed$seed" --go_on || status=$?
            case $status in 2 | 129 | 130 | 143) exit $status ;; esac # bad flags, or told to stop
            [[ $status -eq 0 ]] || failed+=("${value}_seed$seed")
            for candidate in "${table}_${value}_seed$seed" "${table}_${value}_seed${seed}"_[0-9]*; do
                [[ ! -e $candidate/last.pth.tar ]] || { runs+=("$candidate") && break; }
            done
            [[ $value != "${values[0]}" || -n $reference || ! -e $candidate/log_val_Class.csv ]] || reference=$candidate
        done
    done
    status=0
    rm -f "$table.new.csv" "$table.new.svg"
    shown=(--over "$flag")
    if [[ $series == mining ]]; then
        shown=()
        if [[ -n $reference ]]; then shown=(--against "$reference"); else echo "no run of ${values[0]} to compare with"; fi
    fi
    "${PYTHON:-python}" "$here/evaluate.py" --compare ${runs[@]+"${runs[@]}"} ${shown[@]+"${shown[@]}"} \
        --csv "$table.new.csv" --plot "$table.new.svg" || status=$?
    if [[ $status -eq 0 ]]; then # of this series, drawn anew
        mv -f "$table.new.csv" "$table.csv" && mv -f "$table.new.svg" "$table.svg"
        echo "table: $table.csv, plot: $table.svg"
    else
        rm -f "$table.new.csv" "$table.new.svg"
    fi
    if [[ ${#failed[@]} -gt 0 ]]; then
        echo "Result_Runs.sh: failed: ${failed[*]}" >&2
        exit 1
    fi
    exit $status
}

case $name in
    ablation) ablation "$@" ;;
    demo | cub200 | cars196 | online_products | in-shop | vehicle_id) "$name" "$@" ;;
    all)
        failed=()
        for each in cub200 cars196 online_products in-shop vehicle_id; do "$each" "$@" || failed+=("$each"); done
        if [[ ${#failed[@]} -gt 0 ]]; then
            echo "Result_Runs.sh: failed: ${failed[*]}" >&2
            exit 1
        fi
        ;;
    *)
        fail "no set-up '$name'; one of demo, cub200, cars196, online_products, in-shop, vehicle_id, all, ablation"
        ;;
esac
