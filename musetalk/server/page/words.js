// The page's words. English stands in the HTML; what only the script says stands here in both languages.

const ENGLISH = {
  ready: "Ready", draining: "Stopping", gone: "Not reachable", fits: "{n} of {m} sessions",
  idle: "Listening", talking: "Talking", wait: "Connecting …", end: "End", goLive: "Go live",
  needFace: "Make a face first.", liveHint: "Speak, or let it say a file. While you speak its sound is off, so that it doesn't hear itself.",
  noFaceYet: "no face yet", ended: "The session has ended: {why}", lost: "The connection was lost, trying again …",
  micDenied: "The microphone can't be used", micHint: "Allow it in the address bar, and open this page by https or on this machine.",
  noMse: "This browser can't play the stream", noMseHint: "Use a current Chrome, Edge, Firefox or Safari 17.1.",
  saying: "Saying {name}", interrupted: "Stopped after {s} s", making: "Making the face …", made: "{name} is ready. Go live, or render a file.",
  looking: "Looking for the face …", nameNeeded: "Give the face a name.", chooseSpeech: "Choose speech",
  queued: "waiting", in_progress: "rendering", completed: "done", failed: "failed", cancelled: "cancelled",
  remove: "Delete", cancel: "Cancel", download: "Download", sure: "Really delete {name}?", use: "Use", again: "Remake",
  againHint: "Choose the picture of {name}; its settings are filled in.", tookFact: "took", lengthFact: "length", framesFact: "frames", speedFact: "real time",
  sheet: "Contact sheet: frames over the sound", frames: "{n} frames", image: "picture", speechTo: "with", sizeMb: "{n} MB", seconds: "{n} s",
  damaged: "can't be used", session: "Session", viewers: "{n} watching", msFrame: "{n} ms a frame", waitingSpeech: "{n} s waiting", askToken: "This worker asks for its token",
  unreachable: "The worker can't be reached", unreachableHint: "Start it again: python integrated_musetalk_service.py --serve", ms: "{n} ms",
  renderReady: "{face} will say {name}.", preview: "Preview of {name}", noStages: "Shown after the first picture.", problemAt: "{time}",
};

const CHINESE = {
  skip: "跳到舞台", sections: "栏目", navLive: "直播", navRender: "渲染", navFaces: "形象", navWorker: "服务",
  theme: "深色或浅色", liveFace: "实时画面", emptyLead: "让一张照片开口说话", emptyText: "选一张正面单人照片，几秒后即可开口。",
  choosePicture: "选择照片", tryExample: "试试示例", soundOn: "打开声音", face: "形象", watchBy: "观看方式", watchMp4: "视频流", goLive: "开始直播", speak: "说话", sayFile: "播放语音文件",
  stop: "打断", level: "麦克风音量", newFace: "新建形象", dropLabel: "选择或拖入图片、短视频", dropHint: "把人像照片或短视频拖到这里，或点击选择",
  dropKinds: "JPEG、PNG、WebP 或 MP4 · 正面单人", legendBox: "人脸框", legendMask: "替换区域", legendDots: "关键点", name: "名称", bboxShift: "人脸框上下移动",
  parsingMode: "运动范围", modeJaw: "下颌", modeNeck: "下颌与颈部", modeRaw: "整个下半脸", idleMotion: "静止微动", idleHint: "倾听时眨眼、呼吸", makeFace: "生成形象", progress: "进度",
  renderTitle: "渲染文件", fps: "帧率", chooseAudio: "选择语音", renderStart: "开始渲染", renderHint: "任意音频文件。边渲染边播放。", faces: "形象",
  refresh: "刷新", noFaces: "还没有形象，生成后会显示在这里。", workerTitle: "服务状态", sessionsNow: "会话", queueNow: "队列", answerTime: "响应时间", stageTimes: "各阶段耗时",
  problems: "出错记录", noProblems: "目前没有。", footer: "所有数据都留在本机。", apiDocs: "接口文档",
  ready: "就绪", draining: "正在停止", gone: "无法连接", fits: "{n} / {m} 路会话", idle: "倾听中", talking: "说话中", wait: "连接中…", end: "结束",
  needFace: "请先生成一个形象。", liveHint: "对着麦克风说话，或播放语音文件。说话时画面静音，以免回声。", noFaceYet: "暂无形象", ended: "会话已结束：{why}", lost: "连接中断，正在重试…",
  micDenied: "无法使用麦克风", micHint: "请在地址栏允许麦克风，并用 https 或在本机打开。", noMse: "浏览器无法播放该视频流", noMseHint: "请使用新版 Chrome、Edge、Firefox 或 Safari 17.1。",
  saying: "正在播放 {name}", interrupted: "已在 {s} 秒处打断", making: "正在生成形象…", made: "{name} 已就绪，可以直播或渲染。", looking: "正在检测人脸…", nameNeeded: "请填写名称。", chooseSpeech: "选择语音",
  queued: "排队中", in_progress: "渲染中", completed: "完成", failed: "失败", cancelled: "已取消", remove: "删除", cancel: "取消", download: "下载", sure: "确定删除 {name}？",
  use: "使用", again: "重做", againHint: "请选择 {name} 的照片，参数已填好。", tookFact: "耗时", lengthFact: "时长", framesFact: "帧数", speedFact: "倍实时", sheet: "预览表：画面与声音",
  frames: "{n} 帧", image: "图片", speechTo: "配", sizeMb: "{n} MB", seconds: "{n} 秒", damaged: "不可用", session: "会话", viewers: "{n} 人观看", msFrame: "每帧 {n} 毫秒", waitingSpeech: "待播 {n} 秒", askToken: "请输入服务令牌",
  unreachable: "无法连接服务", unreachableHint: "请重新启动：python integrated_musetalk_service.py --serve", ms: "{n} 毫秒", renderReady: "{face} 将说出 {name}。", preview: "{name} 的预览", noStages: "出现首帧画面后显示。", problemAt: "{time}",
};

const saved = localStorage.getItem("language");
let language = saved || (navigator.language.startsWith("zh") ? "zh" : "en");

export const isChinese = () => language === "zh";

export function say(key, values = {}) {
  const words = (isChinese() && CHINESE[key]) || ENGLISH[key] || document.querySelector(`[data-i18n="${key}"]`)?.dataset.english || key;
  return words.replace(/\{(\w+)\}/g, (_, name) => values[name] ?? "");
}

export function translate() {
  document.documentElement.lang = isChinese() ? "zh-CN" : "en";
  for (const element of document.querySelectorAll("[data-i18n]")) {
    element.dataset.english ??= element.textContent;
    element.textContent = (isChinese() && CHINESE[element.dataset.i18n]) || element.dataset.english;
  }
  for (const element of document.querySelectorAll("[data-i18n-label]")) {
    element.dataset.englishLabel ??= element.getAttribute("aria-label");
    element.setAttribute("aria-label", (isChinese() && CHINESE[element.dataset.i18nLabel]) || element.dataset.englishLabel);
  }
}

export function switchLanguage() {
  language = isChinese() ? "en" : "zh";
  localStorage.setItem("language", language);
  translate();
}
