-- Puts a finished job on its queue once more, at once or later, while RQ's Repeat has repetitions left.
--
-- KEYS[1]  the job's hash
-- KEYS[2]  the set of all queues
-- KEYS[3]  the queue's scheduled registry
-- KEYS[4]  the queue's finished registry
-- ARGV[1]  the job id
-- ARGV[2]  the key of the queue's list
--
-- Returns 'queued' or 'scheduled'; false where nothing was to do. The same call again finds the job finished no longer.

local id = ARGV[1]
clear_way('set', KEYS[2])
clear_way('zset', KEYS[3])
clear_way('zset', KEYS[4])
clear_way('list', ARGV[2])
local fields = redis.call('HMGET', KEYS[1], 'status', 'repeats_left', 'repeat_intervals', 'ttl', 'embedq_retries')
local left = seconds(fields[2], 0)
if fields[1] ~= 'finished' or left < 1 then
  return false
end

local readable, intervals = pcall(cjson.decode, fields[3] or '[]')
if not readable or type(intervals) ~= 'table' then
  intervals = {}
end
local interval = seconds(intervals[1], 0)
if #intervals > 1 then
  table.remove(intervals, 1) -- as RQ: the last one stays for all that follow
  redis.call('HSET', KEYS[1], 'repeat_intervals', cjson.encode(intervals))
end
redis.call('HSET', KEYS[1], 'repeats_left', left - 1, 'started_at', '', 'ended_at', '', 'worker_name', '')
-- It has finished: what it once failed by says nothing of it any more.
redis.call('HDEL', KEYS[1], 'embedq_attempts')
if fields[5] then
  redis.call('HSET', KEYS[1], 'retries_left', fields[5])
end
redis.call('ZREM', KEYS[4], id)
redis.call('SADD', KEYS[2], ARGV[2])

start_waiting(KEYS[1], fields[4])
if interval > 0 then
  redis.call('HSET', KEYS[1], 'status', 'scheduled')
  redis.call('ZADD', KEYS[3], math.floor(clock()) + interval, id)
  return 'scheduled'
end
redis.call('HSET', KEYS[1], 'status', 'queued', 'enqueued_at', timestamp())
redis.call('RPUSH', ARGV[2], id)
return 'queued'
