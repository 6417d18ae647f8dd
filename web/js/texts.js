/** Every text that the pack's page shows, in English. */

const seconds = (value) => (value < 60 ? `${value.toFixed(value < 10 ? 1 : 0)} s` : `${Math.floor(value / 60)} min ${Math.round(value % 60)} s`);

export const TEXTS = {
  view: "Rollout under way",
  preview: "Newest frames of the rollout",
  previewOf: (chunk) => `Frames of chunk ${chunk + 1}`,
  progress: "How much of the video is made",
  made: (now, all) => `${now.toFixed(1)} of ${all.toFixed(1)} s`,
  speed: (times) => `${times.toFixed(times < 10 ? 2 : 0)}× real time`,
  left: (value) => `${seconds(value)} left`,
  cache: (bytes) => `KV ${(bytes / 2 ** 20).toFixed(1)} MiB`,
  prompt: (index, text) => (text ? `Prompt ${index + 1}: ${text}` : `Prompt ${index + 1}`),
  meters: {
    colour: ["Colour", "Distance of the mean colour from the first chunk's, in Lab"],
    contrast: ["Contrast", "Standard deviation of brightness"],
    sharpness: ["Sharpness", "Mean step between neighbouring pixels"],
    motion: ["Motion", "Mean change of brightness from frame to frame"],
  },
  meter: (name, value) => `${name}: ${value}`,
  strip: "Chunks; arrow keys move, Enter shows one",
  chunk: (chunk, at) => `Chunk ${chunk + 1}, ${at.toFixed(1)} s`,
  follow: "Follow",
  followHint: "Show the newest frames again",
  stop: "Stop and keep",
  stopHint: "Finish the chunk under way, then end with everything made so far",
  stopping: "Stopping after this chunk",
  outcome: {
    done: "Done",
    stopped: "Stopped and kept",
    failed: "Ended early",
  },
  noPictures: "No pictures: connect Stream To Video, and turn its preview on",
  stopFailed: "The rollout could not be stopped",
};
