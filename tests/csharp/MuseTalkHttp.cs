#region http
using System;
using System.Collections.Generic;
using System.Net.Http;
using System.Text;

/// <summary>The resident worker over HTTP. One object serves any number of threads.</summary>
public sealed class MuseTalkHttp : IDisposable
{
    private readonly HttpClient http;

    /// <param name="address">Such as http://127.0.0.1:28888</param>
    /// <param name="token">What the worker was started with; null on the same machine.</param>
    public MuseTalkHttp(string address, string token = null)
    {
        http = new HttpClient { BaseAddress = new Uri(address), Timeout = TimeSpan.FromSeconds(300) };
        if (token != null) http.DefaultRequestHeaders.Add("Authorization", "Bearer " + token);
    }

    public bool Healthy()
    {
        try { return http.GetAsync("/health").Result.IsSuccessStatusCode; }
        catch (AggregateException) { return false; }
    }

    public Dictionary<string, object> Initialize() { return Post("/api/initialize", null); }

    public Dictionary<string, object> PreprocessTemplate(string templateId, string imagePath, bool force = false)
    {
        return Post("/api/preprocess_template", new Dictionary<string, object>
            { { "template_id", templateId }, { "image_path", imagePath }, { "force", force } });
    }

    public Dictionary<string, object> StartSession(string sessionId, string templateId)
    {
        return Post("/api/start_session", new Dictionary<string, object>
            { { "session_id", sessionId }, { "template_id", templateId } });
    }

    /// <returns>video_path, video_url, frames, duration and more.</returns>
    public Dictionary<string, object> ProcessSegment(string sessionId, string audioPath, int index, bool isFinal)
    {
        return Post("/api/process_segment", new Dictionary<string, object>
            { { "session_id", sessionId }, { "audio_path", audioPath }, { "segment_index", index }, { "is_final", isFinal } });
    }

    public Dictionary<string, object> EndSession(string sessionId)
    {
        return Post("/api/end_session/" + Uri.EscapeDataString(sessionId), null);
    }

    public Dictionary<string, object> Status() { return Read(http.GetAsync("/api/status").Result); }

    /// <summary>A whole clip: one session of one segment.</summary>
    public Dictionary<string, object> Render(string templateId, string audioPath)
    {
        string sessionId = Guid.NewGuid().ToString();
        StartSession(sessionId, templateId);
        try { return ProcessSegment(sessionId, audioPath, 0, true); }
        finally { EndSession(sessionId); }
    }

    /// <summary>A finished video's bytes, where worker and caller share no folder.</summary>
    public byte[] Download(string videoUrl) { return http.GetByteArrayAsync(videoUrl).Result; }

    private Dictionary<string, object> Post(string path, IDictionary<string, object> body)
    {
        HttpContent content = body == null
            ? null : new StringContent(Json.Write(body), Encoding.UTF8, "application/json");
        return Read(http.PostAsync(path, content).Result);
    }

    private static Dictionary<string, object> Read(HttpResponseMessage answer)
    {
        string text = answer.Content.ReadAsStringAsync().Result;
        if (!answer.IsSuccessStatusCode) throw new MuseTalkException((int)answer.StatusCode, text);
        return Json.Parse(text);
    }

    public void Dispose() { http.Dispose(); }
}

/// <summary>An answer that is no success; 503 says try again after a while.</summary>
public sealed class MuseTalkException : Exception
{
    public readonly int Status;

    public MuseTalkException(int status, string body) : base(body) { Status = status; }
}
#endregion
