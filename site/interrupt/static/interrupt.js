// JupyterLite's "Interrupt Kernel" drops the cells that wait, and leaves alone the one that runs. This tells the kernel's
// worker, where gemma_wgpu hears it (gpu/browser.py). Written by hand as the container that JupyterLab loads: it needs
// nothing of what JupyterLab shares.
const COMMANDS = ["notebook:interrupt-kernel", "console:interrupt-kernel"];

const plugin = {
    id: "gemma-wgpu-interrupt:plugin",
    autoStart: true,
    activate: (app) => {
        const channel = new BroadcastChannel("gemma_wgpu.interrupt");
        app.commands.commandExecuted.connect((_, { id }) => {
            if (!COMMANDS.includes(id)) return;
            const kernel = app.shell.currentWidget?.sessionContext?.session?.kernel;
            if (kernel) channel.postMessage(kernel.clientId);
        });
    },
};

const container = { init: () => {}, get: async () => () => ({ __esModule: true, default: plugin }) };
(window._JUPYTERLAB ??= {})["gemma-wgpu-interrupt"] = container;
