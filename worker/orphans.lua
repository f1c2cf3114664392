-- Takes up what a worker that died left undone after the end of jobs, for all queues of this worker. Two workers may
-- both be told of the same job only if the first has not done it in time either.
--
-- KEYS     the queues' sorted sets of such jobs
-- ARGV[1]  seconds after which a job counts as left
-- ARGV[2]  at most so many jobs of a queue
--
-- Returns {place of the queue (1, 2, ...), job id, ...}.

local now = clock()
local replies = {}
for i, key in ipairs(KEYS) do
  clear_way('zset', key)
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', key, '-inf', now - tonumber(ARGV[1]), 'LIMIT', 0, ARGV[2])) do
    redis.call('ZADD', key, now, id)
    replies[#replies + 1] = i
    replies[#replies + 1] = id
  end
end
return replies
