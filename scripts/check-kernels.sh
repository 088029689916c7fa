#!/bin/sh
# Compiles the CUDA kernels and what drives them, with Clippy, and looks at what became of the kernels. Fails if one of
# them keeps local variables in memory (spills, or arrays that are indexed in ways the compiler cannot see through):
# what should be registers would be traffic; or if one that is made for tensor cores lacks their instructions, the loads
# that go with them, or asynchronous copies, or if the compiler has done afterwards what is made to be done beside
# products; or if attention takes far more instructions with a cache of eight bits than with one of sixteen; or, from
# compute capability 9.0 on, if a kernel does not wait for the one before, or loads something but weights before that.
# Prints what each uses. (That products wait for each other which are made to go on by themselves, the build refuses
# itself: kernels/device/build.rs.)
set -eu
cd "$(dirname "$0")/.."

CUDA_HOME=$(scripts/fetch-nvcc.sh | tail -1)
export CUDA_HOME
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# It says where the build script has put the kernels.
cargo clippy --workspace --features cuda --lib --bin engine --test device_pages --test device_doctor --test mover \
    --locked --message-format json-render-diagnostics -- -D warnings >"$work/built"
built=$(sed -n 's/.*"reason":"build-script-executed".*#engine-cuda-device@.*"out_dir":"\([^"]*\)".*/\1/p' "$work/built")
for kernels in kernels hopper; do
    (cd "$work" && "$CUDA_HOME/bin/cuobjdump" -xelf all "$built/$kernels.fatbin" >/dev/null)
done
for target in 80 90 90a; do
    mv "$work"/*.sm_$target.cubin "$work/$target.cubin"
done

# look_at <target>: what its kernels use, and whether any keeps variables in memory.
look_at() {
    "$CUDA_HOME/bin/cuobjdump" --dump-resource-usage "$work/$1.cubin" >"$work/usage"
    awk -v target="$1" '
        /^ *Function / { name = $2; sub(/:$/, "", name) }
        /REG:/ {
            for (i = 1; i <= NF; i++) { split($i, pair, ":"); value[pair[1]] = pair[2] }
            kernels++
            if (value["REG"] > most) { most = value["REG"]; hungriest = name }
            # Its groups of warps share out what the three of them are launched with.
            if (name ~ /^hopper_attention/ && value["REG"] != 168) {
                printf "sm_%s %s: %d registers a thread, not the 168 that it shares out\n", target, name, value["REG"]
                bad = 1
            }
            if (value["LOCAL"] > 0 || value["STACK"] > 0) {
                printf "sm_%s %s: %d bytes of local memory, %d of stack\n", target, name, value["LOCAL"], value["STACK"]
                bad = 1
            }
        }
        END {
            printf "sm_%s: %d kernels, at most %d registers a thread (%s)\n", target, kernels, most, hungriest
            exit bad || kernels == 0
        }' "$work/usage"
}

for target in 80 90; do
    look_at "$target"
    # HMMA: mma. LDSM: ldmatrix, .MT88 where it transposes. LDGSTS: cp.async. (Products of quantised weights have it
    # too, for activations.)
    "$CUDA_HOME/bin/cuobjdump" -sass "$work/$target.cubin" | awk -v target="$target" '
        /^\t\tFunction : / { name = $3; kernels[name] = 1 }
        / HMMA\.16816\.F32/ { found[name, "HMMA"]++ }
        / LDSM\.16\.M88\.4/ { found[name, "LDSM"]++ }
        / LDSM\.16\.MT88\.4/ { found[name, "LDSM transposed"]++ }
        / LDGSTS\./ { found[name, "LDGSTS"]++ }
        function need(what) {
            if (!found[name, what]) { printf "sm_%s %s: no %s\n", target, name, what; bad = 1 }
        }
        END {
            for (name in kernels) {
                if (name !~ /^(product|prefill_attention)_/) continue
                checked++
                need("HMMA"); need("LDSM")
                # Keys and values of eight bits go through registers.
                if (name !~ /^prefill_attention_.*_f8$/) need("LDGSTS")
                if (name ~ /^prefill_attention_/) need("LDSM transposed")
            }
            printf "sm_%s: %d kernels use tensor cores\n", target, checked
            exit bad || checked == 0
        }'
    [ "$target" -ge 90 ] || continue
    # ACQBULK: griddepcontrol.wait. PREEXIT: griddepcontrol.launch_dependents. LDG, LDGSTS: loads of global memory; the
    # others that are looked for write there, or may. A product of few rows (kernels/cuda/skinny.cu) loads so many words
    # of weights before it waits, in so many loads, and nothing else; what goes by the plan, the plan.
    "$CUDA_HOME/bin/cuobjdump" -sass "$work/$target.cubin" | awk -v target="$target" '
        /^\t\tFunction : / { name = $3; kernels[name] = 1 }
        / ACQBULK/ { waits[name]++ }
        / PREEXIT/ { if (waits[name]) starts[name]++ }
        / LDG/ { if (waits[name]) late[name]++; else early[name]++ }
        / (LD|ST|STG|RED|REDG|ATOM|ATOMG)\./ { if (!waits[name]) others[name]++ }
        # What passes by the L1 cache (keys and values), or goes to shared memory.
        / LDG\.E\.NA|LDGSTS/ { if (!waits[name]) large[name]++ }
        function is_wrong(what) { printf "sm_%s %s: %s\n", target, name, what; bad = 1 }
        function weights(name,    form, shape, words, loads, room, at_a_time) {
            match(name, /^skinny_[0-9]+x[0-9]+_/)
            split(substr(name, 8, RLENGTH - 8), shape, "x")
            form = substr(name, RLENGTH + 1)
            words = form == "f32" ? 8 : form ~ /^(b?f16|f8)$/ ? 4 : form == "nibbles" ? 2 : 3
            loads = form ~ /^b?f16$/ ? 1 : 2
            room = shape[1] >= 4 && words < 4 ? 16 : 32
            at_a_time = words * shape[2] < room ? int(room / (words * shape[2])) : 1
            return at_a_time * shape[2] * loads
        }
        END {
            for (name in kernels) {
                if (waits[name] != 1 || starts[name] != 1) is_wrong("it does not wait once, and then let others start")
                if (name ~ /^skinny_/) {
                    products++
                    if (early[name] != weights(name)) is_wrong("it asks for something else than first weights early")
                } else if (name ~ /^(attention|prefill_attention|rope_and_cache)_/) {
                    # The plan: where things lie.
                    if (!early[name] || early[name] > 16 || large[name]) is_wrong("it loads more than the plan early")
                } else if (early[name]) is_wrong("it loads something before it has waited")
                if (others[name]) is_wrong("it may write something before it has waited")
                if (!late[name]) is_wrong("it loads nothing after it has waited")
            }
            printf "sm_%s: %d products ask for weights before the kernel ahead has ended\n", target, products
            exit bad || products == 0
        }'
done

# Where no instruction makes f16 of eight bits, a few do: by the toolkit's function, which minds every case for itself,
# attention would have more than twice the instructions that it has with a cache of f16.
"$CUDA_HOME/bin/cuobjdump" -sass "$work/80.cubin" | awk '
    /^\t\tFunction : / { name = $3 }
    /^ +\/\*[0-9a-f]+\*\/ / { instructions[name]++ }
    END {
        eight = instructions["attention_4x16_f8"]
        sixteen = instructions["attention_4x16_f16"]
        printf "sm_80: attention_4x16 has %d instructions with a cache of f16, and %d with one of f8\n", sixteen, eight
        exit !eight || 2 * eight > 3 * sixteen
    }'

# HGMMA: wgmma, .tnspB where the second operand lies across. UTMALDG.2D: copies of boxes. SYNCS: barriers that they
# arrive at. USETMAXREG: registers left and taken. Attention weighs (MUFU.EX2) while values are multiplied: between the
# wait for all groups of products but one (DEPBAR gsb0, 0x1), and that for all.
look_at 90a
"$CUDA_HOME/bin/cuobjdump" -sass "$work/90a.cubin" | awk '
    /^\t\tFunction : / { name = $3; kernels[name] = 1 }
    / HGMMA\.64x(64|128|192|256)x16\.F32/ { found[name, "HGMMA"]++ }
    / HGMMA.*tnspB/ { found[name, "HGMMA across"]++ }
    / UTMALDG\.2D / { found[name, "UTMALDG"]++ }
    / SYNCS\.PHASECHK/ { found[name, "SYNCS"]++ }
    / USETMAXREG\.(TRY_ALLOC|DEALLOC)/ { found[name, "USETMAXREG"]++ }
    / ACQBULK/ { waits[name]++; found[name, "ACQBULK"]++ }
    / PREEXIT/ { if (waits[name]) found[name, "PREEXIT"]++ }
    / LDG/ { if (!waits[name]) early[name]++ }
    / (LD|ST|STG|RED|REDG|ATOM|ATOMG)\./ { if (!waits[name]) others[name]++ }
    / WARPGROUP\.DEPBAR/ { beside[name] = / gsb0, 0x1 / }
    / MUFU\.EX2/ { if (beside[name]) weighed[name]++ }
    function is_wrong(name, what) { printf "sm_90a %s: %s\n", name, what; bad = 1 }
    function need(what) {
        if (!found[name, what]) is_wrong(name, "no " what)
    }
    END {
        for (name in kernels) {
            checked++
            need("UTMALDG"); need("SYNCS"); need("ACQBULK"); need("PREEXIT")
            if (waits[name] != 1 || found[name, "PREEXIT"] != 1) {
                is_wrong(name, "it does not wait once, and then let others start")
            }
            if (name != "box_check") need("HGMMA")
            if (name ~ /across|attention/) need("HGMMA across")
            if (name ~ /attention/) {
                attention++
                if (found[name, "USETMAXREG"] != 2) is_wrong(name, "no registers are left and taken")
                # Two exponentials for each row of a lane, and one for each of its scores.
                split(name, parts, "_")
                weights = parts[3] == 256 ? 32 : 64
                if (weighed[name] != 2 + weights) is_wrong(name, "it does not weigh while it multiplies")
                # The plan: where things lie.
                if (!early[name] || early[name] > 16) is_wrong(name, "it loads more than the plan early")
            } else if (early[name]) is_wrong(name, "it loads before it has waited")
            if (others[name]) is_wrong(name, "it may write something before it has waited")
        }
        printf "sm_90a: %d kernels copy boxes and multiply them in groups of warps, ", checked
        printf "%d of them for attention\n", attention
        exit bad || !checked || !attention
    }'
