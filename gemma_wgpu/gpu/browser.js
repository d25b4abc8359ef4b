// What browser.py asks of WebGPU, in as few crossings between Python and JavaScript as possible. The value of this
// script is the function that opens the device.
//
// WebGPU says later what went wrong. All that is done with the device lies within error scopes, which `read` closes and
// opens anew, so that a failure comes out of the next read.
async (limits, features) => {
    const adapter = await globalThis.navigator?.gpu?.requestAdapter({ powerPreference: "high-performance" });
    if (!adapter) return undefined;
    const device = await adapter.requestDevice({
        label: "gemma_wgpu",
        requiredLimits: Object.fromEntries(limits.map((name) => [name, adapter.limits[name]])),
        requiredFeatures: features.filter((name) => adapter.features.has(name)),
    });
    const { queue } = device;

    let lost = false;
    device.lost.then(() => (lost = true));
    const checkAlive = () => {
        if (lost) throw new Error("the device was lost");
    };

    const FILTERS = ["validation", "out-of-memory", "internal"];
    const openScopes = () => FILTERS.forEach((filter) => device.pushErrorScope(filter));
    const closeScopes = async () => {
        const errors = await Promise.all(FILTERS.map(() => device.popErrorScope()));
        const error = errors.find(Boolean);
        return error instanceof GPUOutOfMemoryError ? `out of memory: ${error.message}` : error?.message;
    };
    let compilations = []; // promises of what is wrong with pipelines, since the last read
    openScopes();

    // Decoding reads a few bytes every step: small staging buffers are kept.
    const SMALL = 4096;
    const spare = [];
    const stage = (size) =>
        (size <= SMALL && spare.pop()) ||
        device.createBuffer({
            label: "readback",
            size: Math.max(size, SMALL),
            usage: GPUBufferUsage.MAP_READ | GPUBufferUsage.COPY_DST,
        });

    const take = async (staging, size, arrival, failures) => {
        const [mapped, ...reports] = await Promise.allSettled([arrival, ...failures]);
        const failure = reports.find((report) => report.value)?.value;
        if (failure) throw new Error(failure);
        if (mapped.status === "rejected") {
            await Promise.race([device.lost, new Promise((resolve) => setTimeout(resolve, 1000))]); // it says so later
            throw mapped.reason;
        }
        const data = new Uint8Array(staging.getMappedRange(0, size)).slice();
        staging.unmap();
        if (staging.size === SMALL) spare.push(staging);
        else staging.destroy();
        return data;
    };

    const encode = (encoder, programs, timing) => {
        const pass = encoder.beginComputePass(timing);
        for (const program of programs) {
            for (const { pipeline, group, workgroups } of program) {
                pass.setPipeline(pipeline);
                pass.setBindGroup(0, group);
                pass.dispatchWorkgroups(...workgroups);
            }
        }
        pass.end();
    };

    return {
        adapter,
        device,

        isLost: () => lost,

        createBuffer(size, label) {
            checkAlive();
            const usage = GPUBufferUsage.STORAGE | GPUBufferUsage.COPY_SRC | GPUBufferUsage.COPY_DST;
            return device.createBuffer({ size, label, usage });
        },

        createPipeline(label, code, constants) {
            checkAlive();
            openScopes();
            const module = device.createShaderModule({ label, code });
            const compute = { module, entryPoint: "main", constants: Object.fromEntries(constants) };
            const pipeline = device.createComputePipeline({ label, layout: "auto", compute });
            const report = async (failed) => {
                const failure = await failed;
                if (!failure) return undefined;
                const { messages } = await module.getCompilationInfo();
                const errors = messages.filter((message) => message.type === "error");
                const lines = errors.map((error) => `line ${error.lineNum}: ${error.message}`);
                return `shader '${label}' does not compile: ${lines.join("; ") || failure}`;
            };
            compilations.push(report(closeScopes()));
            return pipeline;
        },

        // `data` is anything in Python with a buffer; its bytes go from Python's memory to WebGPU's.
        write(buffer, offset, data) {
            checkAlive();
            const view = data.getBuffer("u8");
            try {
                queue.writeBuffer(buffer, offset, view.data);
            } finally {
                view.release();
            }
        },

        // `view` is a Uint8Array outside of Python's memory.
        writeHeld(buffer, offset, view) {
            checkAlive();
            queue.writeBuffer(buffer, offset, view);
        },

        copy(source, sourceOffset, target, targetOffset, size) {
            checkAlive();
            const encoder = device.createCommandEncoder();
            encoder.copyBufferToBuffer(source, sourceOffset, target, targetOffset, size);
            queue.submit([encoder.finish()]);
        },

        // Resolve [pipeline, [buffer, ...], [x, y, z]] for replay.
        record(dispatches) {
            checkAlive();
            return dispatches.map(([pipeline, buffers, workgroups]) => {
                const entries = buffers.map((buffer, binding) => ({ binding, resource: { buffer } }));
                const layout = pipeline.getBindGroupLayout(0);
                const group = device.createBindGroup({ label: pipeline.label, layout, entries });
                return { pipeline, group, workgroups };
            });
        },

        submit(...programs) {
            checkAlive();
            const encoder = device.createCommandEncoder();
            encode(encoder, programs);
            queue.submit([encoder.finish()]);
        },

        // A promise of nanoseconds, 64 bits each, before and after every one of `count` dispatches.
        async profile(count, ...programs) {
            checkAlive();
            const querySet = device.createQuerySet({ type: "timestamp", count: 2 * count });
            const usage = GPUBufferUsage.QUERY_RESOLVE | GPUBufferUsage.COPY_SRC;
            const resolved = device.createBuffer({ size: 16 * count, usage });
            const encoder = device.createCommandEncoder();
            programs.flat().forEach((call, i) => {
                const indices = { beginningOfPassWriteIndex: 2 * i, endOfPassWriteIndex: 2 * i + 1 };
                encode(encoder, [[call]], { timestampWrites: { querySet, ...indices } });
            });
            encoder.resolveQuerySet(querySet, 0, 2 * count, resolved, 0);
            queue.submit([encoder.finish()]);
            const data = await this.read(resolved, 0, 16 * count);
            resolved.destroy();
            querySet.destroy();
            return data;
        },

        // A promise of the bytes as they are after the programs.
        read(buffer, offset, size, ...programs) {
            checkAlive();
            const staging = stage(size);
            const encoder = device.createCommandEncoder();
            if (programs.length) encode(encoder, programs);
            encoder.copyBufferToBuffer(buffer, offset, staging, 0, size);
            queue.submit([encoder.finish()]);
            const arrival = staging.mapAsync(GPUMapMode.READ, 0, size);
            const failures = [...compilations, closeScopes()];
            compilations = [];
            openScopes();
            return take(staging, size, arrival, failures);
        },
    };
};
